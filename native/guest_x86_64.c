/*
 * guest_x86_64.c - the programs that x86-64 guests run.
 *
 * Each is position independent and driven by registers, so that one step is: set registers, KVM_RUN, read registers.
 * A program reports by `out` to port REPORT (0x10), whose exit carries EAX. They use no stack, no descriptor table and no
 * privileged instruction but `out`, so that they run at CPL 3 with IOPL 3: on kvm-pvm only CPL 3 code runs natively and
 * takes real MMU faults, CPL 0 code is emulated and reads guest memory through userspace_addr (seen on 6.18).
 *
 *   rdi  address          rsi  value          rdx  second value          rcx  count          rax  result
 */
#include "kvmgmem_native.h"

#if defined(__x86_64__)

#define PROGRAM(name, body) \
	__asm__(".pushsection .rodata.kvmgmem_guest,\"a\"\n" \
		".globl kvmgmem_guest_" #name "\n.globl kvmgmem_guest_" #name "_end\n" \
		"kvmgmem_guest_" #name ":\n" body "\nkvmgmem_guest_" #name "_end:\n" \
		".popsection\n"); \
	extern const uint8_t kvmgmem_guest_##name[], kvmgmem_guest_##name##_end[]

/* After the report the program stays put: a run by mistake reports again instead of falling into what follows. */
#define REPORT "777: out %eax, $0x10\n jmp 777b\n"

PROGRAM(load1, "movzbl (%rdi), %eax\n" REPORT);
PROGRAM(load2, "movzwl (%rdi), %eax\n" REPORT);
PROGRAM(load4, "movl (%rdi), %eax\n" REPORT);
PROGRAM(load8, "movq (%rdi), %rax\n" REPORT);
PROGRAM(store1, "movb %sil, (%rdi)\n" REPORT);
PROGRAM(store2, "movw %si, (%rdi)\n" REPORT);
PROGRAM(store4, "movl %esi, (%rdi)\n" REPORT);
PROGRAM(store8, "movq %rsi, (%rdi)\n" REPORT);

/* Store rsi, rsi+1, ... at rcx addresses that are rdx bytes apart. */
PROGRAM(store_each, "1: movq %rsi, (%rdi)\n addq %rdx, %rdi\n incq %rsi\n decq %rcx\n jnz 1b\n" REPORT);

/* Look for rsi, rsi+1, ... at rcx addresses rdx bytes apart: rcx says how many were left at the first difference, rax what stood there. */
PROGRAM(check_each, "1: movq (%rdi), %rax\n cmpq %rsi, %rax\n jne 2f\n addq %rdx, %rdi\n incq %rsi\n decq %rcx\n jnz 1b\n2:\n" REPORT);

/* Look for rsi at rcx addresses rdx bytes apart; as check_each. */
PROGRAM(check_same, "1: movq (%rdi), %rax\n cmpq %rsi, %rax\n jne 2f\n addq %rdx, %rdi\n decq %rcx\n jnz 1b\n2:\n" REPORT);

/* Jump to rdi; what stands there must report by itself (see `report`). */
PROGRAM(jump, "jmp *%rdi\n");
PROGRAM(report, REPORT);

/* Count in rax for ever. */
PROGRAM(spin, "1: incq %rax\n jmp 1b\n");

/* Load from rdi for ever, counting in rcx, until the value is neither rsi nor rdx: then report it in rax. */
PROGRAM(watch, "1: movq (%rdi), %rax\n incq %rcx\n cmpq %rsi, %rax\n je 1b\n cmpq %rdx, %rax\n je 1b\n" REPORT);

/* Store a growing counter at rdi for ever. */
PROGRAM(hammer, "1: incq %rax\n movq %rax, (%rdi)\n jmp 1b\n");

/*
 * Go over the pages of [r8, r9) for ever, from rdi on: report in rax what is neither 0, rsi nor rdx at a page's start, or not
 * 0 in its middle. rbx, unless 0, is stored where a page begins with 0; rcx counts the pages.
 */
PROGRAM(patrol, "1: movq (%rdi), %rax\n incq %rcx\n testq %rax, %rax\n jz 2f\n cmpq %rsi, %rax\n je 3f\n cmpq %rdx, %rax\n je 3f\n"
	" jmp 777f\n"
	"2: testq %rbx, %rbx\n jz 3f\n movq %rbx, (%rdi)\n"
	"3: movq 2048(%rdi), %rax\n testq %rax, %rax\n jnz 777f\n addq $4096, %rdi\n cmpq %r9, %rdi\n jb 1b\n movq %r8, %rdi\n jmp 1b\n"
	REPORT);

/* Wait until rdi holds something other than rsi, then report it. */
PROGRAM(await, "1: pause\n movq (%rdi), %rax\n cmpq %rsi, %rax\n je 1b\n" REPORT);

/* Load from rdi, telling each value at rsi + 8, until rsi holds something other than 0; then load once more, and report that. */
PROGRAM(load_when, "1: movq (%rdi), %rax\n movq %rax, 8(%rsi)\n movq (%rsi), %rcx\n testq %rcx, %rcx\n jz 1b\n movq (%rdi), %rax\n" REPORT);

/* String output of rcx bytes at rsi to port dx: on most backends this goes through KVM's emulator. */
PROGRAM(outs, "cld\n rep outsb\n" REPORT);

/* Copy eight bytes from rsi to rdi in one instruction: with one side in no slot, KVM's emulator reaches for the other. */
PROGRAM(movs8, "cld\n movsq\n" REPORT);

/* Store rsi at rdi, then go on at rdx: code that needs no emulation where it stands, not even for a report. */
PROGRAM(store8_jump, "movq %rsi, (%rdi)\n jmp *%rdx\n");

/* Raise #UD, so that the processor looks into the interrupt descriptor table. */
PROGRAM(undefined, "ud2\n" REPORT);

/* CPL 0 only. */
PROGRAM(halt, "1: hlt\n jmp 1b\n");
PROGRAM(vmcall, "vmcall\n" REPORT);
PROGRAM(vmmcall, "vmmcall\n" REPORT);

#define ENTRY(name) { #name, kvmgmem_guest_##name, kvmgmem_guest_##name##_end }

static const struct {
	const char *name;
	const uint8_t *begin;
	const uint8_t *end;
} programs[] = {
	ENTRY(load1), ENTRY(load2), ENTRY(load4), ENTRY(load8), ENTRY(store1), ENTRY(store2), ENTRY(store4),
	ENTRY(store8), ENTRY(store_each), ENTRY(check_each), ENTRY(check_same), ENTRY(jump), ENTRY(report),
	ENTRY(spin), ENTRY(watch), ENTRY(hammer), ENTRY(await), ENTRY(patrol), ENTRY(load_when), ENTRY(outs), ENTRY(movs8),
	ENTRY(store8_jump), ENTRY(undefined), ENTRY(halt), ENTRY(vmcall), ENTRY(vmmcall),
};

int kvmgmem_guest_program_count(void)
{
	return (int)(sizeof(programs) / sizeof(programs[0]));
}

void kvmgmem_guest_program_get(int index, struct kvmgmem_guest_program *program)
{
	program->name = programs[index].name;
	program->code = programs[index].begin;
	program->size = (size_t)(programs[index].end - programs[index].begin);
}

#else

int kvmgmem_guest_program_count(void)
{
	return 0;
}

void kvmgmem_guest_program_get(int index, struct kvmgmem_guest_program *program)
{
	(void)index;
	(void)program;
}

#endif
