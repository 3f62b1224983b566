/*
 * vcpu_run.c - one KVM_RUN, with a deadline and a kick, from a thread of the caller's choosing.
 *
 * A signal alone is not enough to get a vCPU out: it may arrive just before the thread enters the kernel and be lost. So
 * the handler also sets kvm_run.immediate_exit (KVM_CAP_IMMEDIATE_EXIT, api.rst section 5), which KVM reads after entry.
 * Nothing is re-entered here: an interrupted run answers -EINTR, and the runner says whether a kick or the deadline did it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kvmgmem_native.h"

static __thread struct kvm_run *volatile current_run;
static __thread struct kvmgmem_runner *volatile current_runner;
static pthread_once_t handler_once = PTHREAD_ONCE_INIT;

static int kick_signal(void)
{
	return SIGRTMIN + 4;
}

static void on_kick(int signo, siginfo_t *info, void *context)
{
	struct kvmgmem_runner *runner = current_runner;

	(void)signo;
	(void)context;
	if (!runner)
		return;
	if (info->si_code == SI_TIMER)
		__atomic_store_n(&runner->expired, 1, __ATOMIC_SEQ_CST);
	__atomic_store_n(&current_run->immediate_exit, 1, __ATOMIC_SEQ_CST);
}

static void install_handler(void)
{
	struct sigaction action;

	memset(&action, 0, sizeof(action));
	action.sa_sigaction = on_kick;
	action.sa_flags = SA_SIGINFO; /* no SA_RESTART: the point is to come back */
	sigemptyset(&action.sa_mask);
	sigaction(kick_signal(), &action, NULL);
}

static long arm_deadline(timer_t *timer, int64_t deadline_ns)
{
	struct sigevent event;
	struct itimerspec when;

	memset(&event, 0, sizeof(event));
	event.sigev_notify = SIGEV_THREAD_ID;
	event.sigev_signo = kick_signal();
	event._sigev_un._tid = (int)syscall(SYS_gettid);
	if (timer_create(CLOCK_MONOTONIC, &event, timer))
		return -(long)errno;
	memset(&when, 0, sizeof(when));
	when.it_value.tv_sec = deadline_ns / 1000000000;
	when.it_value.tv_nsec = deadline_ns % 1000000000;
	if (timer_settime(*timer, 0, &when, NULL)) {
		long answer = -(long)errno;

		timer_delete(*timer);
		return answer;
	}
	return 0;
}

/* deadline_ns <= 0: no deadline. Returns KVM_RUN's answer, or the error that kept the deadline from being set. */
long kvmgmem_vcpu_run(int vcpu_fd, struct kvm_run *run, struct kvmgmem_runner *runner, int64_t deadline_ns)
{
	timer_t timer;
	long answer = 0;

	pthread_once(&handler_once, install_handler);
	runner->expired = 0;
	current_run = run;
	current_runner = runner;
	__atomic_store_n(&runner->tid, (int32_t)syscall(SYS_gettid), __ATOMIC_SEQ_CST);
	/* A kick that came before the thread was known: immediate_exit is what it left. */
	if (__atomic_load_n(&runner->kicked, __ATOMIC_SEQ_CST))
		__atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	if (deadline_ns > 0)
		answer = arm_deadline(&timer, deadline_ns);
	if (!answer) {
		answer = kvmgmem_ioctl(vcpu_fd, KVM_RUN, 0);
		if (deadline_ns > 0)
			timer_delete(timer);
	}
	__atomic_store_n(&runner->tid, 0, __ATOMIC_SEQ_CST);
	current_runner = NULL;
	current_run = NULL;
	__atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	return answer;
}

void kvmgmem_vcpu_kick(struct kvm_run *run, struct kvmgmem_runner *runner)
{
	int32_t tid;

	__atomic_store_n(&runner->kicked, 1, __ATOMIC_SEQ_CST);
	__atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	tid = __atomic_load_n(&runner->tid, __ATOMIC_SEQ_CST);
	if (tid)
		syscall(SYS_tgkill, getpid(), tid, kick_signal());
}
