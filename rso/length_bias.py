"""A warning that a ranker prefers longer texts: one sentence, for the log and for the report."""


def length_advice(stage: str, counters: dict[str, float]) -> str | None:
    """Return a warning that a ranker with these held-out figures prefers length, or None.

    The ranker prefers length if two things hold by their 95 % intervals: its accuracy is above one
    half where the chosen text is the longer one, and below one half where it is the shorter one.
    `counters` hold `HeldOut.figures`. `stage` names the ranker.
    """
    longer = counters.get("accuracy_where_chosen_is_longer_low")
    shorter = counters.get("accuracy_where_chosen_is_shorter_high")
    if longer is None or shorter is None or not longer > 0.5 > shorter:
        return None
    found = [counters[f"accuracy_where_chosen_is_{side}"] for side in ("longer", "shorter")]
    return (
        f"{stage}: on held-out comparisons the ranker is right in {found[0]:.0%} where the chosen "
        f"text is the longer one and in {found[1]:.0%} where it is the shorter one: it prefers "
        "length. A policy trained to please it will grow longer. Balance the comparisons by "
        "length, or give it more of them."
    )
