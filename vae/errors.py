"""Errors and warnings of the models, most of them of loading one."""


class LoadError(ValueError):
    """No AutoencoderKL can be loaded from a path, hub id or URL. The message names it and says what is there instead.

    A ValueError, because the reference or the configuration that the caller passed has to change.
    """


class AssumedConfigWarning(UserWarning):
    """A single file has only weights, and no known family was identified. The message names the assumed configuration.

    The tensors' shapes do not determine the scaling constants. Several public VAEs have the same shapes.
    """


class LoadWarning(UserWarning):
    """A model was loaded, but its files left a choice, or have something that was left out. The message says which."""


class AmbiguousLayoutWarning(UserWarning):
    """Latents could have their channels first or last, and the call does not say which. The message names the shape."""
