"""The config of a text model of ours, of which tools of transformers read special tokens."""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin, FrozenDict


class TextModelConfig(FrozenDict):  # type: ignore[misc]
    """A config that transformers.Trainer notes the special tokens of its tokenizer in, as in a config of its own.

    They are attributes, not entries: what is saved of a model does not change.
    """

    def get_text_config(self, **_: object) -> TextModelConfig:
        """Itself: the model has no other part."""
        return self


class WithTextModelConfig(ConfigMixin):  # type: ignore[misc]
    """A model whose config is a `TextModelConfig`."""

    _internal_dict: FrozenDict

    @property
    def config(self) -> TextModelConfig:
        """The arguments of the model, by name."""
        if not isinstance(self._internal_dict, TextModelConfig):
            self._internal_dict = TextModelConfig(self._internal_dict)
        return self._internal_dict
