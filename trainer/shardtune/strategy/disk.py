"""Whether DeepSpeed can keep the optimizer on a disk here."""

from __future__ import annotations

from pathlib import Path

from shardtune.errors import ConfigError

NEEDED = "apt-get install libaio-dev, or your system's package of libaio with its headers"


def check_disk(folder: str) -> None:
    """Refuses `offload: nvme` where it cannot work; builds what it needs, which takes a minute the first time.

    Raises ConfigError.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"strategy.nvme: {folder} cannot be made: {error.strerror}") from None
    from deepspeed.ops import op_builder

    # Its names are made while it is imported.
    input_output, adam = getattr(op_builder, "AsyncIOBuilder")(), getattr(op_builder, "CPUAdamBuilder")()  # noqa: B009
    if not input_output.is_compatible(verbose=False):
        raise ConfigError(
            "strategy.offload: nvme reads and writes through libaio, which is not installed here; install it "
            f"({NEEDED}), or use offload: cpu"
        )
    for builder in (input_output, adam):
        try:
            builder.load(verbose=False)
        except Exception as error:  # whatever the compiler, ninja or the loader say
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise ConfigError(
                f"strategy.offload: nvme needs DeepSpeed's {builder.name}, which cannot be built here: {last[0]}. It "
                f"takes a C++ compiler, ninja and libaio ({NEEDED}); or use offload: cpu"
            ) from error
