/*
 * kvmgmem_native.h - what the binding offers to Python. Mechanism only: no policy and no expectation lives in native/.
 *
 * Every function that enters the kernel returns what the kernel returned, an error as -errno, and retries nothing.
 * cffi releases the GIL around each of them.
 */
#ifndef KVMGMEM_NATIVE_H
#define KVMGMEM_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#include "kvm_abi.h"

/* Why an access or a system call was interrupted by SIGBUS or SIGSEGV; signo 0: it was not. */
struct kvmgmem_fault {
	int32_t signo;
	int32_t code;
	uint64_t address;
};

/* State shared between a thread inside kvmgmem_vcpu_run() and those that want it out. */
struct kvmgmem_runner {
	int32_t tid;
	int32_t kicked;
	int32_t expired;
};

/*
 * Which allocation of the next call fails: the nth, and if filter_fd is not -1 those after it as well, as far as the fault
 * attributes in debugfs go. After the call `left` is 0 if there was an nth. An error is why nothing, or nothing that counts,
 * was called.
 */
struct kvmgmem_fail_nth {
	int32_t counter_fd; /* the calling thread's fail-nth */
	int32_t filter_fd; /* its make-it-fail */
	uint32_t nth;
	uint32_t left;
	int32_t error;
};

struct kvmgmem_guest_program {
	const char *name;
	const uint8_t *code;
	size_t size;
};

/* entry.c: into the kernel */
long kvmgmem_ioctl(int fd, unsigned long request, unsigned long argument);
long kvmgmem_ioctl_ptr(int fd, unsigned long request, void *argument);
long kvmgmem_syscall(long number, unsigned long a, unsigned long b, unsigned long c, unsigned long d, unsigned long e,
		     unsigned long f);
long kvmgmem_bench_ioctl(int fd, unsigned long request, unsigned long argument, long count);

/* guard.c: touching memory that may not be there */
uint64_t kvmgmem_load(uint64_t address, int width, struct kvmgmem_fault *fault);
void kvmgmem_store(uint64_t address, int width, uint64_t value, struct kvmgmem_fault *fault);
void kvmgmem_fill(uint64_t address, size_t length, int byte, struct kvmgmem_fault *fault);
size_t kvmgmem_first_other(uint64_t address, size_t length, int byte, struct kvmgmem_fault *fault);
void kvmgmem_copy_in(void *destination, uint64_t address, size_t length, struct kvmgmem_fault *fault);
void kvmgmem_copy_out(uint64_t address, const void *source, size_t length, struct kvmgmem_fault *fault);
long kvmgmem_guarded_syscall(long number, unsigned long a, unsigned long b, unsigned long c, unsigned long d,
			     unsigned long e, unsigned long f, struct kvmgmem_fault *fault);

/* vcpu_run.c: KVM_RUN with a way out */
long kvmgmem_vcpu_run(int vcpu_fd, struct kvm_run *run, struct kvmgmem_runner *runner, int64_t deadline_ns);
void kvmgmem_vcpu_kick(struct kvm_run *run, struct kvmgmem_runner *runner);

/* fail_nth.c: one call while memory is short */
long kvmgmem_fail_nth_syscall(struct kvmgmem_fail_nth *fail, long number, unsigned long a, unsigned long b,
			      unsigned long c, unsigned long d, unsigned long e, unsigned long f);
uint64_t kvmgmem_fail_nth_load(struct kvmgmem_fail_nth *fail, uint64_t address, int width, struct kvmgmem_fault *fault);
void kvmgmem_fail_nth_store(struct kvmgmem_fail_nth *fail, uint64_t address, int width, uint64_t value,
			    struct kvmgmem_fault *fault);

/* guest_<arch>.c: programs that guests run */
int kvmgmem_guest_program_count(void);
void kvmgmem_guest_program_get(int index, struct kvmgmem_guest_program *program);

#endif
