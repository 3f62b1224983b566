"""How long a supervised guest may take for what, before it counts as lost."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Seconds that things may take on a machine with hardware virtualisation; `scaled` stretches them.

    Silence means neither a record nor a heartbeat. A test is the runner's to end; the
    limit here is for a runner that does not.
    """

    boot: float = 30.0
    silence: float = 15.0
    test: float = 60.0
    shutdown: float = 5.0
    oops: float = 1.0
    """What a test in whose course the kernel oopsed may still take to end."""
    nmi: float = 1.0
    """What a silent guest may take to answer an NMI with its stacks."""

    @property
    def heartbeat(self) -> float:
        """How often the guest is to show life: three times in what would be silence."""
        return min(5.0, self.silence / 3)

    def scaled(self, factor: float) -> "Limits":
        """Limits for emulation, for a kernel full of checks, for a busy host."""
        return Limits(*(getattr(self, name) * factor for name in self.__dataclass_fields__))

    @classmethod
    def unlimited(cls) -> "Limits":
        """For a guest that a debugger holds."""
        return cls(*(float("inf") for _ in cls.__dataclass_fields__))
