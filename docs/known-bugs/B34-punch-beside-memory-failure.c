// SPDX-License-Identifier: GPL-2.0
/*
 * A hole punched into a guest_memfd and a memory error in one of its pages dead-lock.
 *
 * kvm_gmem_punch_hole() takes the mapping's invalidate_lock and then, in truncate_inode_pages_range(),
 * the lock of each folio, which is the order of mm/filemap.c. memory_failure() holds the folio's lock
 * when it calls kvm_gmem_error_folio(), which takes the invalidate_lock, shared. Where the two meet,
 * both threads stay in D state for ever, and as memory_failure() holds mf_mutex, every later memory
 * error of the machine waits as well.
 *
 * Seen on 7.3.4 (x86-64, CONFIG_MEMORY_FAILURE): mostly in the first round. Takes root (MADV_HWPOISON).
 * A machine that shows the bug has to be started again. Run it in a guest.
 *
 * Exit status: 0 the kernel behaves, 1 it shows the bug, 4 it cannot tell (skip).
 * Build: cc -Wall -Wextra -Werror -static -pthread -o bug B34-punch-beside-memory-failure.c
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* What is used here of <linux/kvm.h>, which may be older than the kernel. */
#define KVM_CREATE_VM                0xae01
#define KVM_CREATE_GUEST_MEMFD       0xc040aed4
#define GUEST_MEMFD_FLAG_MMAP        1
#define GUEST_MEMFD_FLAG_INIT_SHARED 2

struct kvm_create_guest_memfd {
	uint64_t size;
	uint64_t flags;
	uint64_t reserved[6];
};

#define PAGE   4096L
#define SIZE   (PAGE << 15)
#define ROUNDS 20
#define LIMIT  60 /* seconds for all rounds, which take less than one each */

static int skip(const char *what)
{
	printf("SKIP: %s: %s\n", what, strerror(errno));
	return 4;
}

static void *punch(void *gmem)
{
	fallocate(*(int *)gmem, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, SIZE);
	return NULL;
}

/* Poison the last page but one of a file while all of it is punched. */
static int clash(int vm, int round)
{
	struct kvm_create_guest_memfd request = {
		.size = SIZE,
		.flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
	};
	int gmem = ioctl(vm, KVM_CREATE_GUEST_MEMFD, &request);
	pthread_t thread;
	char *page;

	if (gmem < 0)
		return skip("KVM_CREATE_GUEST_MEMFD with MMAP and INIT_SHARED");
	if (fallocate(gmem, FALLOC_FL_KEEP_SIZE, 0, SIZE))
		return skip("allocating 128 MiB of gmem");
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, gmem, SIZE - 2 * PAGE);
	if (page == MAP_FAILED)
		return skip("mapping a page of gmem");
	(void)*(volatile char *)page; /* mapped, so that the error has its page at once */
	if (pthread_create(&thread, NULL, punch, &gmem))
		return skip("starting a thread");
	usleep(100 * round);
	/* EBUSY is gmem's answer to an error in its page; EFAULT: the hole came first. */
	if (madvise(page, PAGE, MADV_HWPOISON) && (errno == EPERM || errno == EINVAL))
		return skip("MADV_HWPOISON");
	pthread_join(thread, NULL);
	munmap(page, PAGE);
	close(gmem);
	return 0;
}

static int all_rounds(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, status = 0;

	if (kvm < 0)
		return skip("/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		return skip("KVM_CREATE_VM");
	for (int round = 0; round < ROUNDS && !status; round++)
		status = clash(vm, round);
	return status;
}

int main(void)
{
	int status;
	pid_t child;

	setbuf(stdout, NULL);
	signal(SIGBUS, SIG_IGN); /* of the poisoned page; a touch of it would end the process anyway */
	child = fork();
	if (child < 0)
		return skip("fork");
	if (!child)
		_exit(all_rounds());
	for (int tenths = 0; tenths < 10 * LIMIT; tenths++) {
		if (waitpid(child, &status, WNOHANG) == child) {
			if (!WIFEXITED(status)) {
				printf("SKIP: the process ended by signal %d\n", WTERMSIG(status));
				return 4;
			}
			if (!WEXITSTATUS(status))
				printf("OK: %d holes beside as many memory errors came to their end\n", ROUNDS);
			return WEXITSTATUS(status);
		}
		usleep(100000);
	}
	printf("BUG: a hole and a memory error wait for each other: see /proc/%d/task/*/stack\n", child);
	return 1; /* the child stays: nothing ends it */
}
