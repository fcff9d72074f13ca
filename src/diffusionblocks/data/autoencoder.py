"""Image autoencoders, of diffusers or TAESD's own files, and latents on the scale on which they are trained on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.progress import without_loading_bars
from .latent_data import LatentScale

__all__ = ["ImageAutoencoder", "load_vae"]

_EXAMPLE = "stabilityai/sd-vae-ft-ema"
_PROBE = 64  # pixels of the image by which an autoencoder tells its reduction
_DECODED_AT_ONCE = 32  # images; the activations of a decoder are many times as large as they


class ImageAutoencoder:
    """An autoencoder of colour images, in float32, for inference: one way to call classes that differ.

    Args:
        module: an autoencoder class of diffusers, with `encode`, `decode` and `config`, or a `TinyAutoencoder`. One of
            video, such as `AutoencoderKLQwenImage`, gets an image as a video of one frame.
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
    def latent_shape(self) -> tuple[int, int]:
        """Channels of its latents, and by how much it reduces height and width, tried on a black image.

        Raises:
            ValueError: it takes no colour images.
        """
        channels = getattr(self._config, "in_channels", 3)
        if channels != 3:
            raise ValueError(f"vae = {self.name!r}: takes images of {channels} channels: must be 3 (RGB)")
        with torch.no_grad():
            mean, _ = self._posterior(torch.zeros(1, 3, _PROBE, _PROBE, device=self.device))
        return mean.shape[1], _PROBE // mean.shape[2]

    @property
    def scale(self) -> LatentScale | None:
        """What its config says of its latents' mean and deviation; None where it says nothing.

        A `scaling_factor` of 1 without anything else is that of a class whose weights were never measured.

        Raises:
            ValueError: its values are not those of a `LatentScale`.
        """
        config = self._config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        factor = getattr(config, "scaling_factor", None)
        shift = float(getattr(config, "shift_factor", None) or 0.0)
        if mean is None and std is None and shift == 0 and factor in (None, 1.0):
            return None
        scale = LatentScale(
            1.0 if factor is None else float(factor),
            shift,
            None if mean is None else tuple(map(float, mean)),
            None if std is None else tuple(map(float, std)),
        )
        scale.check_channels(self.latent_shape[0])
        return scale

    @torch.no_grad()
    def encode(self, images: Tensor, scale: LatentScale) -> tuple[Tensor, Tensor]:
        """The posterior of the latents of some images.

        Args:
            images: floating (n, 3, H, W) in [-1, 1], on the autoencoder's device.
            scale: what the latents are brought to.

        Returns:
            Mean and standard deviation, float32 (n, C, h, w) each; the deviation is 0 of an autoencoder without noise.
        """
        mean, std = self._posterior(images)
        shift, factor = scale.shift_and_factor(images)
        return (mean - shift) * factor, std * factor

    @torch.no_grad()
    def decode(self, latents: Tensor, scale: LatentScale) -> Tensor:
        """The images of some latents.

        Args:
            latents: floating (n, C, h, w), on the autoencoder's device.
            scale: how they were scaled, which is undone first; of latents as a model sees them
                `scale.times(LatentBatches.scale)`.

        Returns:
            float32 (n, 3, H, W), clamped to [-1, 1].
        """
        shift, factor = scale.shift_and_factor(latents)
        raw = latents.float() / factor + shift
        return torch.cat([self._images(part).float().clamp(-1, 1) for part in raw.split(_DECODED_AT_ONCE)])

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's own latents, float32."""
        output = self.module.encode(images.float().unsqueeze(2) if self._of_video else images.float())
        # Classes name what they return: a distribution, or the latents themselves.
        posterior = getattr(output, "latent_dist", None)
        if posterior is not None:
            mean, std = posterior.mean, posterior.std
        else:
            names = ("latent", "latents")
            mean = next((getattr(output, name) for name in names if hasattr(output, name)), output)
            std = torch.zeros_like(mean)
        if self._of_video:
            mean, std = mean.squeeze(2), std.squeeze(2)
        return mean.float(), std.float()

    def _images(self, latents: Tensor) -> Tensor:
        output = self.module.decode(latents.unsqueeze(2) if self._of_video else latents)
        images: Tensor = getattr(output, "sample", output)
        return images.squeeze(2) if self._of_video else images


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
