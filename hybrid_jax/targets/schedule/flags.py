"""The TPU compiler's flags that make it write a kernel's schedule; undocumented, so only here."""

import pathlib

# A pass label is part of a file's name. Everything else would be a hundred times as much to write.
BUNDLES, UTILIZATION = "final_bundles", "final_hlo-static-per-bundle-utilization"


def init_args(directory: pathlib.Path) -> str:
    """LIBTPU_INIT_ARGS, which libtpu reads once, when it is loaded."""
    return " ".join(
        (
            f"--xla_jf_dump_to={directory}",
            "--xla_jf_dump_llo_text=true",
            f"--xla_jf_dump_llo_pass_label_regex={BUNDLES}|{UTILIZATION}",
        )
    )


def refusal(stderr: str) -> str | None:
    """What to say where this libtpu does not know a flag; None if that is not the trouble."""
    if "Unknown command line flag" not in stderr:
        return None
    line = next(line for line in stderr.splitlines() if "Unknown command line flag" in line)
    return (
        f"This libtpu writes no schedules in the way it is asked to ({line.strip()}). The flags "
        "are undocumented and stand in hybrid_jax/targets/schedule/flags.py; libtpu 0.0.42 and "
        "0.0.50 know them."
    )


def files_of(directory: pathlib.Path, kernel: str, label: str) -> list[pathlib.Path]:
    """The files of one pass of one kernel."""
    return [
        path
        for path in directory.glob(f"*-{label}.txt")
        # TIME-KERNEL-NN-LABEL.txt; `schedule-analysis_final_bundles` is another pass.
        if path.name.removesuffix(f"-{label}.txt").partition("-")[2].rpartition("-")[0] == kernel
    ]
