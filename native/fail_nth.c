/*
 * fail_nth.c - one entry into the kernel during which an allocation of the calling thread fails.
 *
 * Linux counts a thread's allocations down in its /proc file fail-nth and fails the one that brings it to 0
 * (Documentation/fault-injection/fault-injection.rst; CONFIG_FAULT_INJECTION). Whatever else the thread did between arming
 * and the call would count too, and could fail in its stead: so arming, the one call, reading back and disarming are here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "kvmgmem_native.h"

static int put(int fd, const char *text, int length)
{
	return pwrite(fd, text, length, 0) == length ? 0 : -errno;
}

/* The counter first: make-it-fail lets allocations fail at once where no counter runs. */
static int arm(struct kvmgmem_fail_nth *fail)
{
	char text[16];
	int length = snprintf(text, sizeof(text), "%u", fail->nth);

	fail->left = fail->nth;
	fail->error = put(fail->counter_fd, text, length);
	if (!fail->error && fail->filter_fd >= 0)
		fail->error = put(fail->filter_fd, "1", 1);
	return fail->error;
}

static void disarm(struct kvmgmem_fail_nth *fail)
{
	char text[16] = "";

	if (fail->filter_fd >= 0)
		fail->error = put(fail->filter_fd, "0", 1);
	if (pread(fail->counter_fd, text, sizeof(text) - 1, 0) < 1)
		fail->error = -errno;
	fail->left = (uint32_t)strtoul(text, NULL, 10);
	if (put(fail->counter_fd, "0", 1))
		fail->error = -errno;
}

long kvmgmem_fail_nth_syscall(struct kvmgmem_fail_nth *fail, long number, unsigned long a, unsigned long b,
			      unsigned long c, unsigned long d, unsigned long e, unsigned long f)
{
	long answer = 0;

	if (!arm(fail)) {
		answer = kvmgmem_syscall(number, a, b, c, d, e, f);
		disarm(fail);
	}
	return answer;
}

uint64_t kvmgmem_fail_nth_load(struct kvmgmem_fail_nth *fail, uint64_t address, int width, struct kvmgmem_fault *fault)
{
	uint64_t value = 0;

	if (!arm(fail)) {
		value = kvmgmem_load(address, width, fault);
		disarm(fail);
	}
	return value;
}

void kvmgmem_fail_nth_store(struct kvmgmem_fail_nth *fail, uint64_t address, int width, uint64_t value,
			    struct kvmgmem_fault *fault)
{
	if (!arm(fail)) {
		kvmgmem_store(address, width, value, fault);
		disarm(fail);
	}
}
