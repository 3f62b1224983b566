"""The reader of kernel logs: what it finds in logs of every ugly shape, and what it leaves alone."""

import pytest

from kvmgmem.splats import (
    DENY,
    Kind,
    block_is_complete,
    find_splats,
    kind_of,
    message_of,
    stack_fingerprint,
    stack_functions,
)

WARNING = """\
[   12.000001] kvm: running nested
[   12.100000] ------------[ cut here ]------------
[   12.100100] WARNING: arch/x86/kvm/mmu/mmu.c:812 at __link_shadow_page+0x1b/0x40, CPU#1: python3/412
[   12.100200] CPU: 1 UID: 0 PID: 412 Comm: python3 Not tainted 7.3.4 #1 PREEMPTLAZY
[   12.100300] RIP: 0010:__link_shadow_page+0x1b/0x40
[   12.100400] Code: 00 00 0f 0b
[   12.100500] RSP: 0018:ffffc900004f7b30 EFLAGS: 00010246
[   12.100600] Call Trace:
[   12.100700]  <TASK>
[   12.100800]  ? leftover_of_an_earlier_call+0x7d/0x130
[   12.100900]  mmu_install_spte.isra.0+0x55/0x210
[   12.101000]  kvm_tdp_page_fault+0x10/0x20
[   12.101100]  entry_SYSCALL_64_after_hwframe+0x4b/0x53
[   12.101200]  </TASK>
[   12.101300] ---[ end trace 0000000000000000 ]---
[   12.200000] kvm: done
""".splitlines()

OOPS_THEN_PANIC = """\
[    5.000000] BUG: unable to handle page fault for address: ffffea0000000008
[    5.000100] #PF: supervisor write access in kernel mode
[    5.000200] Oops: Oops: 0002 [#1] SMP NOPTI
[    5.000300] CPU: 0 UID: 0 PID: 1 Comm: init Not tainted 7.3.4 #1
[    5.000400] RIP: 0010:kvm_gmem_release+0x17/0xa0
[    5.000500] Call Trace:
[    5.000600]  <TASK>
[    5.000700]  __fput+0xe1/0x2b0
[    5.000800]  task_work_run+0x5c/0x90
[    5.000900]  </TASK>
[    5.001000] ---[ end trace 0000000000000000 ]---
[    5.001100] Kernel panic - not syncing: Fatal exception
[    5.001200] ---[ end Kernel panic - not syncing: Fatal exception ]---
""".splitlines()

LOCKDEP = """\
======================================================
WARNING: possible circular locking dependency detected
7.3.4 #2 Not tainted
------------------------------------------------------
python3/99 is trying to acquire lock:
ffff888003c40a70 (&kvm->slots_lock){+.+.}-{4:4}, at: kvm_vm_ioctl+0x1/0x2
stack backtrace:
Call Trace:
 <TASK>
 dump_stack_lvl+0x5b/0x90
 check_noncircular+0x148/0x160
 __lock_acquire+0x1135/0x1e20
 kvm_vm_ioctl+0x1/0x2
 </TASK>
""".splitlines()


def test_a_warning_is_found_whole() -> None:
    """A WARN() is one complaint, from its "cut here" to its end mark, named by its first line."""
    (splat,) = find_splats(WARNING)
    assert splat.kind is Kind.WARNING
    assert splat.title.startswith("WARNING: arch/x86/kvm/mmu/mmu.c:812 at __link_shadow_page")
    assert splat.lines == tuple(WARNING[1:-1])
    assert not splat.fatal
    assert block_is_complete(splat)
    assert splat.fingerprint in splat.reason


def test_a_stack_is_named_without_plumbing() -> None:
    """Guesses, printing and entry code do not tell causes apart; compiler clones of one function are one."""
    (splat,) = find_splats(WARNING)
    assert stack_functions(splat.lines) == ("__link_shadow_page", "mmu_install_spte", "kvm_tdp_page_fault")


def test_an_oops_and_the_panic_it_ends_in_are_one() -> None:
    """The panic behind an oops is the same event: one complaint, fatal, titled by the oops, which names the cause."""
    (splat,) = find_splats(OOPS_THEN_PANIC)
    assert splat.kind is Kind.PANIC
    assert splat.fatal
    assert splat.title == "BUG: unable to handle page fault for address: ffffea0000000008"
    assert splat.lines == tuple(OOPS_THEN_PANIC)
    assert stack_functions(splat.lines)[0] == "kvm_gmem_release"


def test_two_warnings_are_two() -> None:
    """Complaints that follow each other stay apart."""
    assert [splat.kind for splat in find_splats([*WARNING, *LOCKDEP])] == [Kind.WARNING, Kind.LOCKDEP]


def test_lockdep_keeps_its_frame() -> None:
    """A lockdep report begins with its line of equal signs, and its stack starts at the lock's taker."""
    (splat,) = find_splats(LOCKDEP)
    assert splat.lines[0].startswith("====")
    assert stack_functions(splat.lines) == ("__lock_acquire", "kvm_vm_ioctl")
    assert not block_is_complete(splat)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Kernel panic - not syncing: sysrq triggered crash", Kind.PANIC),
        ("BUG: KASAN: slab-use-after-free in kvm_gmem_bind+0x1/0x2", Kind.KASAN),
        ("BUG: kernel NULL pointer dereference, address: 0000000000000008", Kind.OOPS),
        ("Oops: general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP", Kind.OOPS),
        ("general protection fault, probably for non-canonical address 0xdead: 0000 [#1] PREEMPT SMP", Kind.OOPS),
        ("invalid opcode: 0000 [#1] PREEMPT SMP", Kind.OOPS),
        ("kernel BUG at virt/kvm/guest_memfd.c:77!", Kind.OOPS),
        ("Unable to handle kernel paging request at virtual address dead000000000108", Kind.OOPS),
        ("UBSAN: shift-out-of-bounds in virt/kvm/guest_memfd.c:12:3", Kind.UBSAN),
        ("watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [python3:77]", Kind.LOCKUP),
        ("watchdog: CPU3: Watchdog detected hard LOCKUP on cpu 3", Kind.LOCKUP),
        ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", Kind.RCU_STALL),
        ("rcu: INFO: rcu_preempt self-detected stall on CPU", Kind.RCU_STALL),
        ("rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 0-.... }", Kind.RCU_STALL),
        ("rcu: rcu_preempt kthread starved for 5250 jiffies! g1 f0x0", Kind.RCU_STALL),
        ("INFO: task python3:77 blocked for more than 120 seconds.", Kind.HUNG_TASK),
        ("INFO: task python3:77 blocked in I/O wait for more than 120 seconds.", Kind.HUNG_TASK),
        ("WARNING: suspicious RCU usage", Kind.LOCKDEP),
        ("WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected", Kind.LOCKDEP),
        ("[ BUG: Invalid wait context ]", Kind.LOCKDEP),
        ("kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)", Kind.LEAK),
        ("BUG: Bad page state in process python3  pfn:12345", Kind.BUG),
        ("BUG: sleeping function called from invalid context at mm/page_alloc.c:1", Kind.BUG),
        ("BUG kmalloc-64 (Not tainted): Right Redzone overwritten", Kind.BUG),
        ("list_del corruption. prev->next should be ffff888, but was 0", Kind.BUG),
        ("WARNING: CPU: 0 PID: 1 at virt/kvm/kvm_main.c:1 kvm_put_kvm+0x1/0x2", Kind.WARNING),
    ],
)
def test_every_kind_is_known_by_its_first_line(line: str, kind: Kind) -> None:
    """First lines as the kernel prints them, bare and behind what printk puts before them."""
    assert kind_of(line) is kind
    assert kind_of(f"[    1.234567] {line}") is kind
    assert kind_of(f"[    1.234567][  T123] {line}") is kind
    assert kind_of(f"4,339,5140900,-;{line}") is kind
    assert kind_of(f"half a line of someb[    1.234567] {line}\r") is kind


@pytest.mark.parametrize(
    "line",
    [
        "kvm: Nested Virtualization enabled",
        "python3[77]: segfault at 8 ip 00007f33 sp 00007ffc error 6 in libpython3.11.so",
        "traps: python3[77] general protection fault ip:7f33 sp:7ffc error:0 in libc.so.6",
        "Memory failure: 0x1234: recovery action for dirty LRU page: Recovered",
        "Memory cgroup out of memory: Killed process 12 (python3) total-vm:1kB",
        "MCE: Killing python3:77 due to hardware memory corruption fault at 7f00",
        "Spectre V2 : WARNING: Unprivileged eBPF is enabled",
        "sysrq: Show Blocked State",
        "Call Trace:",
        "Kernel command line: console=ttyS0 panic=-1 oops=panic",
        "debug: what a test prints about WARNING: nothing",
    ],
)
def test_what_is_no_complaint_is_left_alone(line: str) -> None:
    """Processes that die, memory errors that were asked for and words in the middle of a line are not the kernel's fault."""
    assert kind_of(f"[    1.234567] {line}") is None


def test_every_pattern_compiles_and_matches_something_only_from_the_start() -> None:
    """A deny pattern that could match anywhere would catch what tests print."""
    assert len({pattern.regex for pattern in DENY}) == len(DENY)
    assert not any(pattern.regex.startswith(".*") for pattern in DENY)


def test_one_cause_has_one_fingerprint_whatever_the_numbers() -> None:
    """Times, addresses, offsets, PIDs and CPUs differ between boots; the fingerprint does not."""
    other = [
        line.replace("12.1", "99.7").replace("+0x1b/0x40", "+0x2f/0x80").replace("412", "77").replace("CPU#1", "CPU#0")
        for line in WARNING
    ]
    assert find_splats(other)[0].fingerprint == find_splats(WARNING)[0].fingerprint
    elsewhere = [line.replace("kvm_tdp_page_fault", "kvm_gmem_populate") for line in WARNING]
    assert find_splats(elsewhere)[0].fingerprint != find_splats(WARNING)[0].fingerprint


def test_a_complaint_without_a_stack_has_a_fingerprint_of_its_words() -> None:
    """Without a trace, the first line without its numbers stands for the cause."""
    first = ["BUG: Bad rss-counter state mm:00000000aaaa type:MM_ANONPAGES val:3"]
    second = ["BUG: Bad rss-counter state mm:00000000bbbb type:MM_ANONPAGES val:5"]
    third = ["BUG: Bad page map in process python3"]
    assert stack_fingerprint(first) == stack_fingerprint([first[0].replace("val:3", "val:5")])
    assert stack_fingerprint(first) != stack_fingerprint(third)
    assert len(stack_fingerprint(second)) == 8


def test_prefixes_are_taken_off() -> None:
    """Time stamps, callers, priorities and /dev/kmsg's header are no part of a message."""
    assert message_of("<4>[    0.000000] hello") == "hello"
    assert message_of("[   12.345678][   T42] hello\r\n") == "hello"
    assert message_of("6,339,5140900,-;hello") == "hello"
    assert message_of("hello") == "hello"


def test_a_log_of_nothing_holds_nothing() -> None:
    """No lines, no complaints."""
    assert find_splats([]) == []
    assert find_splats(["", "[    0.000000] Linux version 7.3.4"]) == []
