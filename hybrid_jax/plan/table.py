"""A report for a reader."""

GIB = 2**30


def lines(report: dict) -> list[str]:
    """The plan as Markdown."""
    out = [
        f"# {report['preset']}, {report['step']} on {report['target']}",
        "",
        f"{report['chips']} chips ({report['devices']} devices) as {report['mesh']}, rules "
        f"{report['rules']}; batch {report['batch']} x {report['seq']:,} tokens"
        + (f", remat {report['remat']}" if report["remat"] else "")
        + (f", moments {report['moments']}" if report["moments"] != "float32" else "")
        + f". Compiled in {report['compile_seconds']:.0f} s, with "
        f"{report['host_peak_bytes'] / 1e9:.1f} GB of this machine's memory.",
        "",
        _fit(report),
    ]
    if report["step_seconds"] is None:
        return out
    out += ["", *_rate(report), "", *_causes(report), "", *_traffic(report)]
    out += ["", *(f"- {name}: {text}" for name, text in report["definitions"].items())]
    return out


def _fit(report: dict) -> str:
    peak, budget = report["peak_bytes_per_device"], report["budget_bytes_per_device"]
    if report["fits"]:
        verdict = f"**Fits**, with {(budget - peak) / GIB:.1f} GiB a device to spare"
    else:
        verdict = f"**Does not fit**: {(peak - budget) / GIB:.1f} GiB a device too much"
    parts = ", ".join(
        f"{name} {size / GIB:.1f}" for name, size in report["memory"].items() if size >= 0.05 * GIB
    )
    detail = f" ({parts})" if parts else ", says the compiler"
    return f"{verdict}: {peak / GIB:.1f} of {budget / GIB:.1f} GiB{detail}."


def _rate(report: dict) -> list[str]:
    step = report["step_seconds"]
    rows = [
        f"Predicted: {step:.3g} s a step, {report['tokens_per_second']:,.0f} tokens/s, "
        f"**MFU {report['predicted_mfu']:.1%}**; bound by {report['bound']}.",
    ]
    if report["time_source"] == "model":
        rows.append("Every time is a roofline model's: this compiler gives none.")
    else:
        shares = ", ".join(
            f"{share:.0%} {name}" for name, share in sorted(report["time_sources"].items())
        )
        rows.append(f"Working time by source: {shares}.")
    if "dollars_per_billion_tokens" in report:
        rows.append(f"{report['dollars_per_billion_tokens']:,.0f} dollars a billion tokens.")
    if report["unknown_loops"]:
        rows.append(
            f"{report['unknown_loops']} loops depend on data: each is counted until the end of the "
            "array it goes through."
        )
    return rows


def _causes(report: dict) -> list[str]:
    return [
        "| where the step goes | s | share |",
        "|---|---|---|",
        *(
            f"| {each['cause']} | {each['seconds']:.3g} | {each['share']:.1%} |"
            for each in report["causes"]
        ),
    ]


def _traffic(report: dict) -> list[str]:
    ordered = sorted(report["traffic"], key=lambda each: -each["seconds"])
    return [
        "| collective | axes | count | GB a device | s on the links | of it waited for |",
        "|---|---|---|---|---|---|",
        *(
            f"| {each['kind']} | {'+'.join(each['axes'])} | {each['count']:,.0f} | "
            f"{each['bytes'] / 1e9:.2f} | {each['seconds']:.3g} | "
            f"{each['exposed'] / each['seconds'] if each['seconds'] else 0:.0%} |"
            for each in ordered
        ),
    ]


def search_lines(reports: list[dict], failures: list[tuple[str, str]]) -> list[str]:
    """A ranking; those that do not fit come last, and what did not compile below."""
    out = [
        "| rank | mesh | rules | batch | remat | fits | peak GiB | s a step | tokens/s | MFU | "
        "bound by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rank, each in enumerate(reports, 1):
        timed = each["step_seconds"] is not None
        figures = (
            f"{each['step_seconds']:.3g} | {each['tokens_per_second']:,.0f} | "
            f"{each['predicted_mfu']:.1%} | {each['bound']}"
            if timed
            else "- | - | - | memory"
        )
        out.append(
            f"| {rank} | {each['mesh']} | {each['rules']} | {each['batch']} | "
            f"{each['remat'] or 'preset'} | {'yes' if each['fits'] else 'no'} | "
            f"{each['peak_bytes_per_device'] / GIB:.1f} | {figures} |"
        )
    return out + [f"- not compiled, {what}: {why}" for what, why in failures]
