"""SELinux's policy, asked through its own filesystem, and a process's domain.

The files `access` and `create` answer what is written to them (security/selinux/selinuxfs.c). SELinux is the one security
module of Linux 7.3 with a hook for the creation of anonymous inodes (security_inode_init_security_anon).
"""

import os
from collections.abc import Iterator
from pathlib import Path

SELINUXFS = Path("/sys/fs/selinux")
_PERMISSIVE = 1 << 0


def judges_anon_inodes() -> bool:
    """Whether SELinux enforces a policy that knows the class of anonymous inodes."""
    try:
        return (SELINUXFS / "enforce").read_text().strip() == "1" and (SELINUXFS / "class" / "anon_inode").is_dir()
    except OSError:
        return False


class Selinux:
    """The loaded policy. Contexts are strings like `user:role:type:level`."""

    def current(self) -> str:
        """The context of this process."""
        return _context(Path("/proc/self/attr/current"))

    def enter(self, context: str) -> None:
        """Change the context of this process, which must have one thread; raises OSError if policy denies it."""
        Path("/proc/self/attr/current").write_text(context)

    def allows(self, source: str, target: str, object_class: str, permission: str) -> bool:
        """Whether policy, or a permissive source domain, lets `source` have a permission on `target`."""
        directory = SELINUXFS / "class" / object_class
        number = (directory / "index").read_text().strip()
        bit = int((directory / "perms" / permission).read_text())
        words = _ask("access", f"{source} {target} {number}").split()
        allowed, flags = int(words[0], 16), int(words[5], 16) if len(words) > 5 else 0
        return bool(allowed >> bit - 1 & 1 or flags & _PERMISSIVE)

    def may_create_anon_inode(self, context: str, name: str) -> bool:
        """Whether a process in this context may create an anonymous inode of a class like `[kvm-gmem]`."""
        number = (SELINUXFS / "class" / "anon_inode" / "index").read_text().strip()
        label = _ask("create", f"{context} {context} {number} {name}")
        return self.allows(context, label, "anon_inode", "create")

    def denied_domain(self, name: str) -> str | None:
        """A context of some running process that ours may change into and that may not create such an inode."""
        here = self.current()
        if not self.allows(here, here, "process", "setcurrent"):
            return None
        for context in sorted(set(_contexts_in_use()) - {here}):
            reachable = self.allows(here, context, "process", "dyntransition") and self.allows(context, here, "fd", "use")
            if reachable and not self.may_create_anon_inode(context, name):
                return context
        return None


def _contexts_in_use() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/attr/current"):
        try:
            yield _context(path)
        except OSError:
            continue  # the process is gone


def _context(path: Path) -> str:
    return path.read_text().rstrip("\0\n")


def _ask(name: str, question: str) -> str:
    fd = os.open(SELINUXFS / name, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, question.encode())
        return os.read(fd, 4096).decode().rstrip("\0\n")
    finally:
        os.close(fd)
