"""What goes wrong while a model is loaded."""


class LoadError(ValueError):
    """There is no AutoencoderKL where one was asked for; the message says what is there instead."""


class AssumedConfigWarning(UserWarning):
    """A file holds weights only, and more than one public VAE has its shapes; the message says which was taken."""
