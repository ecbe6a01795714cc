"""Whether a ranker likes length alone: one sentence, for the log and for the report."""


def length_advice(stage: str, counters: dict[str, float]) -> str | None:
    """What to say of a ranker with these held-out figures; None where nothing is wrong.

    It likes length when it is right where the chosen text is the longer one and wrong where it is
    the shorter one, both more clearly than chance (95 % intervals).
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
