/* entry.c - the calls into the kernel: the kernel's answer as a value, -errno for an error, nothing retried. */
#include <errno.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kvmgmem_native.h"

long kvmgmem_ioctl(int fd, unsigned long request, unsigned long argument)
{
	/* syscall(2), not ioctl(2): ioctl() returns an int, and a count above INT_MAX must arrive whole. */
	long answer = syscall(SYS_ioctl, fd, request, argument);

	return answer < 0 ? -(long)errno : answer;
}

long kvmgmem_ioctl_ptr(int fd, unsigned long request, void *argument)
{
	return kvmgmem_ioctl(fd, request, (unsigned long)argument);
}

long kvmgmem_syscall(long number, unsigned long a, unsigned long b, unsigned long c, unsigned long d, unsigned long e,
		     unsigned long f)
{
	long answer;

	errno = 0;
	answer = syscall(number, a, b, c, d, e, f);
	/* mmap and friends may return an address that is negative as a long only on error. */
	return answer == -1 && errno ? -(long)errno : answer;
}

/* The yardstick for `make bench-harness`: the same ioctl in a C loop. Returns the last answer. */
long kvmgmem_bench_ioctl(int fd, unsigned long request, unsigned long argument, long count)
{
	long answer = 0;

	while (count-- > 0)
		answer = kvmgmem_ioctl(fd, request, argument);
	return answer;
}
