/*
 * guard.c - loads, stores and system calls during which SIGBUS and SIGSEGV are an answer, not the end of the process.
 *
 * A fault inside a guarded access jumps back to it and is reported as (signal, code, address). A fault anywhere else goes
 * to whoever handled the signal before (Python's faulthandler, say), so that a real crash stays a real crash.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kvmgmem_native.h"

enum guard_mode { GUARD_NONE, GUARD_JUMP, GUARD_RECORD };

static __thread volatile enum guard_mode guard_mode;
static __thread sigjmp_buf guard_back;
static __thread struct kvmgmem_fault *guard_fault;

static struct sigaction previous_bus, previous_segv;
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;

static void hand_on(int signo, siginfo_t *info, void *context)
{
	const struct sigaction *previous = signo == SIGBUS ? &previous_bus : &previous_segv;

	if (previous->sa_flags & SA_SIGINFO) {
		previous->sa_sigaction(signo, info, context);
	} else if (previous->sa_handler != SIG_DFL && previous->sa_handler != SIG_IGN) {
		previous->sa_handler(signo);
	} else {
		/* The default action: returning with the default handler in place faults again and dies properly. */
		signal(signo, SIG_DFL);
		if (info->si_code <= 0)
			raise(signo);
	}
}

static void on_fault(int signo, siginfo_t *info, void *context)
{
	enum guard_mode mode = guard_mode;

	if (mode == GUARD_NONE) {
		hand_on(signo, info, context);
		return;
	}
	guard_fault->signo = signo;
	guard_fault->code = info->si_code;
	guard_fault->address = (uint64_t)info->si_addr;
	if (mode == GUARD_JUMP)
		siglongjmp(guard_back, 1);
}

static void install_one(int signo, struct sigaction *previous)
{
	struct sigaction current, ours;

	/* Asked each time: faulthandler may have been switched on since, and would then stand in front of us. */
	sigaction(signo, NULL, &current);
	if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_fault)
		return;
	memset(&ours, 0, sizeof(ours));
	ours.sa_sigaction = on_fault;
	ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
	sigemptyset(&ours.sa_mask);
	*previous = current;
	sigaction(signo, &ours, NULL);
}

static void guard_enter(enum guard_mode mode, struct kvmgmem_fault *fault)
{
	memset(fault, 0, sizeof(*fault));
	pthread_mutex_lock(&install_lock);
	install_one(SIGBUS, &previous_bus);
	install_one(SIGSEGV, &previous_segv);
	pthread_mutex_unlock(&install_lock);
	guard_fault = fault;
	guard_mode = mode;
}

static void guard_leave(void)
{
	guard_mode = GUARD_NONE;
}

uint64_t kvmgmem_load(uint64_t address, int width, struct kvmgmem_fault *fault)
{
	volatile uint64_t value = 0;

	guard_enter(GUARD_JUMP, fault);
	if (!sigsetjmp(guard_back, 1)) {
		switch (width) {
		case 1:
			value = *(volatile uint8_t *)address;
			break;
		case 2:
			value = *(volatile uint16_t *)address;
			break;
		case 4:
			value = *(volatile uint32_t *)address;
			break;
		default:
			value = *(volatile uint64_t *)address;
			break;
		}
	}
	guard_leave();
	return value;
}

void kvmgmem_store(uint64_t address, int width, uint64_t value, struct kvmgmem_fault *fault)
{
	guard_enter(GUARD_JUMP, fault);
	if (!sigsetjmp(guard_back, 1)) {
		switch (width) {
		case 1:
			*(volatile uint8_t *)address = (uint8_t)value;
			break;
		case 2:
			*(volatile uint16_t *)address = (uint16_t)value;
			break;
		case 4:
			*(volatile uint32_t *)address = (uint32_t)value;
			break;
		default:
			*(volatile uint64_t *)address = value;
			break;
		}
	}
	guard_leave();
}

void kvmgmem_fill(uint64_t address, size_t length, int byte, struct kvmgmem_fault *fault)
{
	guard_enter(GUARD_JUMP, fault);
	if (!sigsetjmp(guard_back, 1))
		memset((void *)address, byte, length);
	guard_leave();
}

/* The offset of the first byte that is not `byte`, or `length` if all are. */
size_t kvmgmem_first_other(uint64_t address, size_t length, int byte, struct kvmgmem_fault *fault)
{
	const volatile uint8_t *bytes = (const volatile uint8_t *)address;
	volatile size_t at = 0;

	guard_enter(GUARD_JUMP, fault);
	if (!sigsetjmp(guard_back, 1)) {
		uint64_t pattern = 0x0101010101010101ULL * (uint8_t)byte;
		size_t i = 0;

		for (; i + 8 <= length && *(const volatile uint64_t *)(bytes + i) == pattern; i += 8)
			;
		for (; i < length && bytes[i] == (uint8_t)byte; i++)
			;
		at = i;
	}
	guard_leave();
	return at;
}

void kvmgmem_copy_in(void *destination, uint64_t address, size_t length, struct kvmgmem_fault *fault)
{
	guard_enter(GUARD_JUMP, fault);
	if (!sigsetjmp(guard_back, 1))
		memcpy(destination, (const void *)address, length);
	guard_leave();
}

void kvmgmem_copy_out(uint64_t address, const void *source, size_t length, struct kvmgmem_fault *fault)
{
	guard_enter(GUARD_JUMP, fault);
	if (!sigsetjmp(guard_back, 1))
		memcpy((void *)address, source, length);
	guard_leave();
}

/* For calls after which the kernel may send the caller a SIGBUS (MADV_HWPOISON): the signal is noted, the call not undone. */
long kvmgmem_guarded_syscall(long number, unsigned long a, unsigned long b, unsigned long c, unsigned long d,
			     unsigned long e, unsigned long f, struct kvmgmem_fault *fault)
{
	long answer;

	guard_enter(GUARD_RECORD, fault);
	answer = kvmgmem_syscall(number, a, b, c, d, e, f);
	guard_leave();
	return answer;
}
