"""Autoencoders of images and videos, of diffusers or TAESD's own files, and latents on the scale that is trained on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.digests import tensors_digest
from ..common.progress import without_loading_bars
from .latent_data import LatentScale

__all__ = ["ImageAutoencoder", "load_vae"]

_EXAMPLE = "stabilityai/sd-vae-ft-ema"
_PROBE = 64  # pixels of the image by which an autoencoder tells its reduction
_MOST_IN_TIME = 8  # frames of a video that become one
_DECODED_AT_ONCE = 32  # images, or 1 video; the activations of a decoder are many times as large as they


class ImageAutoencoder:
    """An autoencoder of colour images or videos, in float32, for inference: one way to call classes that differ.

    Args:
        module: an autoencoder class of diffusers, with `encode`, `decode` and `config`, or a `TinyAutoencoder`. One of
            video, such as `AutoencoderKLWan`, gets an image as a video of one frame.
        name: folder or hub name, for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module.eval().requires_grad_(False)
        self.name = name
        self._of_video = any(isinstance(part, nn.Conv3d) for part in module.modules())

    @property
    def _config(self) -> Any:
        return getattr(self.module, "config", None)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = next(self.module.parameters()).device
        return device

    @functools.cached_property
    def weights(self) -> str:
        """SHA-256 of its weights, by which other ones under the same name are noticed."""
        return tensors_digest(self.module.state_dict())

    @functools.cached_property
    def latent_shape(self) -> tuple[int, int]:
        """Channels of its latents, and by how much it reduces height and width, tried on two black images.

        Raises:
            ValueError: it takes no colour images, or does not give them back at their size.
        """
        channels = getattr(self._config, "in_channels", 3)
        if channels != 3:
            raise ValueError(f"vae = {self.name!r}: takes images of {channels} channels: must be 3 (RGB)")
        try:
            latents = [self._latents_of_black(pixels) for pixels in (_PROBE, 2 * _PROBE)]
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"vae = {self.name!r}: a black image cannot be encoded and decoded: {reason}; give an autoencoder of "
                "images, as AutoencoderKL is one"
            ) from error
        return latents[0].shape[1], _PROBE // latents[0].shape[2]

    @torch.no_grad()
    def _latents_of_black(self, pixels: int) -> Tensor:
        """The latents of a black image; ValueError unless it is decoded to its size."""
        image = torch.zeros(1, 3, pixels, pixels, device=self.device)
        latents, _ = self._posterior(image)
        back = tuple(self._images(latents).shape)
        if back != tuple(image.shape):
            raise ValueError(f"of {tuple(image.shape)} it makes {back}")
        return latents

    def check_frames(self, frames: int) -> None:
        """Refuse videos of a number of frames that it does not give back, tried on a black one.

        Raises:
            ValueError: it is an autoencoder of images, or gives back fewer frames; the message names those that it can.
        """
        if not self._of_video:
            raise ValueError(f"vae = {self.name!r}: it is of images; for videos give one such as AutoencoderKLWan")
        back = self._frames_decoded(frames)
        if back != frames:
            more = (
                count for count in range(frames + 1, frames + _MOST_IN_TIME + 1) if self._frames_decoded(count) == count
            )
            whole = " or ".join(str(count) for count in (back, next(more, None)) if count is not None)
            raise ValueError(f"frames = {frames}: of these {self.name!r} gives back {back}: must be such as {whole}")

    @torch.no_grad()
    def _frames_decoded(self, frames: int) -> int:
        video = torch.zeros(1, 3, frames, _PROBE, _PROBE, device=self.device)
        return self._images(self._posterior(video)[0]).shape[2]

    @property
    def scale(self) -> LatentScale | None:
        """What its config says of its latents' mean and deviation; None where it says nothing.

        A `scaling_factor` of 1 without anything else is that of a class whose weights were never measured.

        Raises:
            ValueError: its values are not those of a `LatentScale`.
        """
        config = self._config
        mean, std = (self._statistic(name) for name in ("latents_mean", "latents_std"))
        factor = getattr(config, "scaling_factor", None)
        shift = float(getattr(config, "shift_factor", None) or 0.0)
        if mean is None and std is None and shift == 0 and factor in (None, 1.0):
            return None
        scale = LatentScale(
            1.0 if factor is None else float(factor),
            shift,
            mean,
            std,
        )
        scale.check_channels(self.latent_shape[0])
        return scale

    def _statistic(self, name: str) -> tuple[float, ...] | None:
        """Of each channel, in its config, or among its weights as AutoencoderKLLTXVideo has it; None without."""
        value = getattr(self._config, name, None)
        if value is None:
            value = dict(self.module.named_buffers(recurse=False)).get(name)
        return None if value is None else tuple(map(float, value))

    @torch.no_grad()
    def encode(self, images: Tensor, scale: LatentScale) -> tuple[Tensor, Tensor]:
        """The posterior of the latents of some images.

        Args:
            images: floating (n, 3, H, W), or of videos (n, 3, F, H, W), in [-1, 1], on the autoencoder's device.
            scale: what the latents are brought to.

        Returns:
            Mean and standard deviation, float32 (n, C, h, w), or (n, C, T, h, w), each; the deviation is 0 of an
            autoencoder without noise.
        """
        mean, std = self._posterior(images)
        shift, factor = scale.shift_and_factor(images)
        return (mean - shift) * factor, std * factor

    @torch.no_grad()
    def decode(self, latents: Tensor, scale: LatentScale) -> Tensor:
        """The images of some latents.

        Args:
            latents: floating (n, C, h, w), or of videos (n, C, T, h, w), on the autoencoder's device.
            scale: how they were scaled, which is undone first; of latents as a model sees them
                `scale.times(LatentBatches.scale)`.

        Returns:
            float32 (n, 3, H, W), or (n, 3, F, H, W), clamped to [-1, 1].
        """
        shift, factor = scale.shift_and_factor(latents)
        raw = latents.float() / factor + shift
        parts = raw.split(_DECODED_AT_ONCE if raw.dim() == 4 else 1)
        return torch.cat([self._images(part).float().clamp(-1, 1) for part in parts])

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's own latents, float32."""
        one_frame = self._of_video and images.dim() == 4
        output = self.module.encode(images.float().unsqueeze(2) if one_frame else images.float())
        # Classes name what they return: a distribution, or the latents themselves.
        posterior = getattr(output, "latent_dist", None)
        if posterior is not None:
            mean, std = posterior.mean, posterior.std
        else:
            names = ("latent", "latents")
            mean = next((getattr(output, name) for name in names if hasattr(output, name)), output)
            std = torch.zeros_like(mean)
        if one_frame:
            mean, std = mean.squeeze(2), std.squeeze(2)
        return mean.float(), std.float()

    def _images(self, latents: Tensor) -> Tensor:
        one_frame = self._of_video and latents.dim() == 4
        # Decoders of LTX that also denoise are told how much noise is left: none.
        timed = getattr(self._config, "timestep_conditioning", False)
        time = {"temb": latents.new_zeros(len(latents))} if timed else {}
        output = self.module.decode(latents.unsqueeze(2) if one_frame else latents, **time)
        images: Tensor = getattr(output, "sample", output)
        return images.squeeze(2) if one_frame else images


def load_vae(name: str, device: torch.device) -> ImageAutoencoder:
    """Load an autoencoder in float32, for inference. No code and no pickle is loaded with it.

    Args:
        name: a local folder, or a name on the hub such as "stabilityai/sd-vae-ft-ema", of an autoencoder class of
            diffusers, by itself or in the folder `vae` of a pipeline; or a local folder with TAESD's
            `*encoder.safetensors` and `*decoder.safetensors`.
        device: where to.

    Raises:
        FileNotFoundError: no such folder or name, or it has no safetensors weights.
        ValueError: it is no autoencoder of images.
        ConnectionError: the hub cannot be reached, and its cache has no copy.
        ImportError: diffusers is not installed.
    """
    from ..models.tiny_autoencoder import TinyAutoencoder  # the models import diffusers, which takes seconds

    folder = Path(name).expanduser()
    files = TinyAutoencoder.files_in(folder) if folder.is_dir() else None
    module: nn.Module = _of_diffusers(name) if files is None else TinyAutoencoder.from_files(*files)
    return ImageAutoencoder(module.to(device), name)


def _of_diffusers(name: str) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"an autoencoder needs the diffusers library ({error}): pip install diffusers") from error
    local = Path(name).is_dir() or _is_only_cached(name)
    try:
        config, subfolder = _config_of(name, local)
        # Files of the first versions do not name their class.
        class_name = str(config.get("_class_name", "AutoencoderKL"))
        if not class_name.startswith(("Autoencoder", "AsymmetricAutoencoder")):
            raise ValueError(f"its config names the class {class_name}")
        with without_loading_bars():
            result: Any = getattr(diffusers, class_name).from_pretrained(
                name,
                subfolder=subfolder,
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
                local_files_only=local,
            )
    except OSError as error:
        raise FileNotFoundError(
            f"vae = {name!r}: {error}; give a folder with config.json and diffusion_pytorch_model.safetensors, one "
            f"with TAESD's *encoder.safetensors and *decoder.safetensors, or a name on the hub such as {_EXAMPLE!r}"
        ) from error
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # Another class of model, or other shapes.
        raise ValueError(f"vae = {name!r}: not an autoencoder of diffusers: {error}") from error
    vae, report = result
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"vae = {name!r}: not an autoencoder of diffusers: its file lacks {missing[:3]}, ...")
    module: nn.Module = vae
    return module


def _config_of(name: str, local: bool) -> tuple[dict[str, Any], str | None]:
    """The config of an autoencoder, and the folder that it lies in below the name."""
    from diffusers import AutoencoderKL

    try:
        return dict(AutoencoderKL.load_config(name, local_files_only=local)), None
    except OSError:
        try:
            return dict(AutoencoderKL.load_config(name, subfolder="vae", local_files_only=local)), "vae"
        except OSError:
            pass
        raise


def _is_only_cached(name: str) -> bool:
    """Whether a repository can be read from the cache alone: the hub, asked once, does not give it.

    Who asks for a file where there is no network asks again for half a minute, for each file.

    Raises:
        FileNotFoundError: no such repository, or no name of one, and no copy in the cache. ValueError: it takes terms
            to be accepted, or another token. ConnectionError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    from ..core.hub import HubErrors, check_name

    cached = False
    try:
        check_name(name, "no such folder here, and no name on the hub")
        cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "vae/config.json"))
        with HubErrors(name).told():
            HfApi().model_info(name)
    except (OSError, ValueError) as error:
        if not cached:
            raise type(error)(f"vae = {error}") from None  # which names it
    else:
        return False
    return True
