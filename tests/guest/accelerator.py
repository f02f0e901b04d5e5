"""How the guest's processor is made: by the machine's own virtualisation where a stock kernel runs on it, else emulated.

`/dev/kvm` alone proves nothing: where it is a paravirtual variant without VT-x or SVM, a stock kernel hangs right after
it was loaded. So the processor's flags are asked, and a boot that does not answer in time is repeated emulated.
THINPOOL_GUEST_ACCEL=kvm or =tcg decides by itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

OPTIONS: dict[str, Sequence[str]] = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"),
}
# An emulated boot takes four seconds on a quiet machine; a hanging one takes for ever.
BOOT_SECONDS_MAX = {"kvm": 30.0, "tcg": 120.0}


def candidates() -> list[str]:
    """Names of OPTIONS to try, in this order."""
    chosen = os.environ.get("THINPOOL_GUEST_ACCEL")
    if chosen:
        if chosen not in OPTIONS:
            raise ValueError(f"THINPOOL_GUEST_ACCEL is {' or '.join(OPTIONS)}, not {chosen!r}")
        return [chosen]
    return ["kvm", "tcg"] if _has_kvm() else ["tcg"]


def _has_kvm() -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or Path("/sys/module/kvm_pvm").exists():
        return False
    flags = Path("/proc/cpuinfo").read_text().split()
    return "vmx" in flags or "svm" in flags
