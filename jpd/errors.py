"""Errors that users of jpd meet. Each message names the value at fault and the allowed range."""


class JpdError(Exception):
    """Base of every error that jpd raises on purpose."""

    http_status: int = 500


class ConfigError(JpdError, ValueError):
    """The engine cannot be built from these arguments, this checkpoint or this machine."""


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword that no configuration field has; the message names what to write instead."""


class CheckpointError(ConfigError):
    """A checkpoint does not hold what its config promises; all its faults are in one message."""


class KernelError(JpdError):
    """A kernel computes something else than its reference on this machine; nothing is served."""


class RequestError(JpdError, ValueError):
    """A request that can never be served as asked; other requests are not touched."""

    http_status = 400


class PromptTooLongError(RequestError):
    """Prompt and requested tokens exceed `max_model_len` or what the KV pages can ever hold."""

    http_status = 413


class EngineDeadError(JpdError):
    """The engine stopped after an internal failure; its cause is the `__cause__`."""
