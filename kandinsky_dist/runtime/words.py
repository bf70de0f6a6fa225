"""Figures as people read them. No torch."""

import datetime


def rate(samples_per_second: float) -> str:
    """A rate in four digits, however slow or fast: 0.05257 or 87,387 samples/s."""
    digits = f"{samples_per_second:,.0f}" if samples_per_second >= 1000 else f"{samples_per_second:.4g}"
    return f"{digits} samples/s"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:16:10; from a day on, 2 days, 3:00:00."""
    return str(datetime.timedelta(seconds=round(seconds)))
