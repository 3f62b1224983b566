"""The fixed parts of a C program: helpers, each emitted only where it is used, and what the guest programs do."""

from typing import Final

# Every helper: what it needs of the others, and its text. They are emitted in this order.
HELPERS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "turn": (
        (),
        """/* Whose turn it is: the processes take turns, in the order of the numbers. -1: it is over. */
static volatile int *turn;""",
    ),
    "cannot_tell": (
        (),
        """static void cannot_tell(const char *what)
{
	printf("SKIP: %s: %s\\n", what, errno ? strerror(errno) : "so it says nothing");
	exit(4);
}""",
    ),
    "cannot_tell_turn": (
        ("turn",),
        """static void cannot_tell(const char *what)
{
	printf("SKIP: %s: %s\\n", what, errno ? strerror(errno) : "so it says nothing");
	*turn = -1;
	exit(4);
}""",
    ),
    "await_turn": (
        ("turn",),
        """static void await_turn(int number)
{
	while (*turn != number) {
		if (*turn < 0)
			exit(4);
		usleep(100);
	}
}""",
    ),
    "must": (
        ("cannot_tell",),
        """/* For what has to work before the question can be put. */
static long must(long answer, const char *what)
{
	if (answer < 0)
		cannot_tell(what);
	return answer;
}""",
    ),
    "must_map": (
        ("cannot_tell",),
        """static void *must_map(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
	void *mapping = mmap(address, length, prot, flags, fd, offset);

	if (mapping == MAP_FAILED)
		cannot_tell("mmap");
	return mapping;
}""",
    ),
    "answered": (
        (),
        """/* An answer of the C library as the kernel gave it: -errno for an error. */
static long answered(long answer)
{
	return answer < 0 ? -errno : answer;
}""",
    ),
    "identity_tables": (
        (),
        """/* Page tables at guest address `gpa` that map the first 4 GiB to themselves with 2 MiB pages. */
static void identity_tables(void *memory, uint64_t gpa)
{
	uint64_t *entry = memory;

	entry[0] = (gpa + 0x1000) | 7;
	for (int i = 0; i < 4; i++)
		entry[512 + i] = (gpa + 0x2000 + 0x1000 * i) | 7;
	for (int i = 0; i < 4 * 512; i++)
		entry[1024 + i] = i * 0x200000ULL | 0x87;
}""",
    ),
    "set_supported_cpuid": (
        ("must",),
        """static void set_supported_cpuid(int kvm, int vcpu)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = { .head.nent = 256 };

	must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	must(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
}""",
    ),
    "set_msr": (
        ("must",),
        """static void set_msr(int vcpu, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} msrs = { .head.nmsrs = 1, .entry = { .index = index, .data = value } };

	must(ioctl(vcpu, KVM_SET_MSRS, &msrs), "KVM_SET_MSRS");
}""",
    ),
    "run": (
        ("answered", "cannot_tell"),
        """/* Run a vCPU; it must come out with this answer and this exit for the rest to make sense. */
static void run(int vcpu, struct kvm_run *page, long wanted_answer, uint32_t wanted_exit)
{
	long answer = answered(ioctl(vcpu, KVM_RUN, 0));

	errno = 0;
	page->immediate_exit = 0;
	if (answer == wanted_answer && page->exit_reason == wanted_exit)
		return;
	printf("KVM_RUN: %ld with exit %u, not %ld with %u\\n", answer, page->exit_reason, wanted_answer, wanted_exit);
	cannot_tell("the guest took another way");
}""",
    ),
    "directory": (
        ("cannot_tell",),
        """/* debugfs's directory of the VM in question, which is there for exactly as long as the VM. */
static char *directory;

static void note_directory(int vm)
{
	sprintf(directory, "/sys/kernel/debug/kvm/%ld-%d", syscall(SYS_gettid), vm);
	if (access(directory, F_OK))
		cannot_tell(directory);
}

/* Whether the VM lives. One that should be gone may take a moment. */
static int lives(int wanted)
{
	int alive = 1;

	for (int i = 0; i < 300 && alive; i++) {
		alive = !access(directory, F_OK);
		if (wanted)
			break;
		usleep(10000);
	}
	return alive;
}""",
    ),
    "statistic": (
        ("must",),
        """/* One of KVM's statistics, of a VM or a vCPU (KVM_GET_STATS_FD). */
static long statistic(int of, const char *name)
{
	struct {
		uint32_t flags, name_size, count, id_at, descriptors_at, data_at;
	} head;
	struct {
		uint32_t flags;
		int16_t exponent;
		uint16_t size;
		uint32_t offset, bucket_size;
		char name[256];
	} about;
	int fd = must(ioctl(of, KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD");
	uint64_t value;

	must(pread(fd, &head, sizeof(head), 0), "pread");
	for (uint32_t i = 0, length = 16 + head.name_size; i < head.count && length < sizeof(about); i++) {
		must(pread(fd, &about, length, head.descriptors_at + i * length), "pread");
		about.name[head.name_size] = 0;
		if (strcmp(about.name, name))
			continue;
		must(pread(fd, &value, sizeof(value), head.data_at + about.offset), "pread");
		close(fd);
		return value;
	}
	errno = 0;
	cannot_tell(name);
	return -1;
}""",
    ),
    "must_stand": (
        ("statistic",),
        """static void must_stand(int of, const char *name, long wanted)
{
	if (statistic(of, name) == wanted)
		return;
	errno = 0;
	cannot_tell(name);
}""",
    ),
    "touch": (
        (),
        """/* A signal in between is an answer here, not the end. */
static sigjmp_buf back;

static void on_signal(int number)
{
	siglongjmp(back, number);
}

/* Read eight bytes or fewer: minus the number of the signal that it raised, or 0 and the value. */
static long try_load(const void *address, int width, uint64_t *value)
{
	int number;

	signal(SIGBUS, on_signal);
	signal(SIGSEGV, on_signal);
	number = sigsetjmp(back, 1);
	if (number)
		return -number;
	if (width == 1)
		*value = *(const volatile uint8_t *)address;
	else if (width == 2)
		*value = *(const volatile uint16_t *)address;
	else if (width == 4)
		*value = *(const volatile uint32_t *)address;
	else
		*value = *(const volatile uint64_t *)address;
	return 0;
}""",
    ),
    "touch_store": (
        ("touch",),
        """static long try_store(void *address, uint64_t value)
{
	int number = sigsetjmp(back, 1);

	if (number)
		return -number;
	signal(SIGBUS, on_signal);
	signal(SIGSEGV, on_signal);
	*(volatile uint8_t *)address = value;
	return 0;
}""",
    ),
    "is_filled": (
        (),
        """static int is_filled(const unsigned char *memory, size_t length, int byte)
{
	for (size_t i = 0; i < length; i++)
		if (memory[i] != byte)
			return 0;
	return 1;
}""",
    ),
    "send_fd": (
        ("must",),
        """/* A descriptor on its way to another process (SCM_RIGHTS). */
static void send_fd(int channel, int fd)
{
	char byte = 0, room[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = { 0 };
	struct iovec data = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room) };
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);

	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(rights), &fd, sizeof(fd));
	must(sendmsg(channel, &message, 0), "sendmsg");
}""",
    ),
    "receive_fd": (
        ("must",),
        """static int receive_fd(int channel)
{
	char byte, room[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
	struct iovec data = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room) };
	int fd;

	must(recvmsg(channel, &message, 0), "recvmsg");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
	return fd;
}""",
    ),
    "end_of": (
        ("must",),
        """/* The exit status of a child; 4 if it did not end by itself. */
static int end_of(pid_t child)
{
	int status;

	must(waitpid(child, &status, 0), "waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 4;
}""",
    ),
    "kick": (
        (),
        """static void on_kick(int number)
{
	(void)number;
}

/* Get a vCPU's thread out of KVM_RUN. */
static void kick(pthread_t thread, struct kvm_run *page)
{
	page->immediate_exit = 1;
	pthread_kill(thread, SIGUSR1);
}""",
    ),
    "text": (
        (),
        """static const char *text(long long value, char *room)
{
	if (value < 0 && value > -4096)
		return strerror(-value);
	sprintf(room, "%#llx", value);
	return room;
}""",
    ),
    "verdict": (
        ("text",),
        """static int verdict(const char *what, long long got, long long wanted)
{
	char ours[24], theirs[24];

	printf("%s: %s: got %s, wanted %s\\n", got == wanted ? "OK" : "BUG", what, text(got, ours), text(wanted, theirs));
	return got != wanted;
}""",
    ),
    "verdict_of_round": (
        ("text",),
        """/* Rounds that go well say nothing. */
static int verdict(const char *what, long long got, long long wanted)
{
	char ours[24], theirs[24];

	if (got != wanted)
		printf("BUG: %s: got %s, wanted %s\\n", what, text(got, ours), text(wanted, theirs));
	return got != wanted;
}""",
    ),
    "shortage": (
        ("cannot_tell",),
        """/* What a round may come to, beside 0, 1 and 4: the call needs fewer allocations, or answered something else. */
enum { UNTOUCHED = 5, ANOTHER_WAY };

static int fail_nth;

static void set_knob(const char *name, const char *value)
{
	static const char *const injectors[] = { "failslab", "fail_page_alloc" };
	char path[100];
	int known = 0;

	for (int i = 0; i < 2; i++) {
		int fd, length = strlen(value);

		sprintf(path, "/sys/kernel/debug/%s/%s", injectors[i], name);
		fd = open(path, O_WRONLY);
		if (fd < 0)
			continue; /* some are of slabs alone, some of pages */
		known += write(fd, value, length) == length;
		close(fd);
	}
	if (!known)
		cannot_tell(path);
}

/* Allocations that may sleep take part, too. Threads that do not ask for it are not concerned by any of this. */
static void prepare_shortage(void)
{
	set_knob("probability", "0");
	set_knob("ignore-gfp-wait", "N");
	set_knob("ignore-gfp-highmem", "N");
	set_knob("cache-filter", "N");
	set_knob("min-order", "0");
	set_knob("verbose", "0");
	set_knob("interval", "1");
	set_knob("space", "0");
	set_knob("task-filter", "%TASK_FILTER%");
	set_knob("times", "64");%PROBABILITY%
	fail_nth = open("/proc/thread-self/fail-nth", O_RDWR);
	if (fail_nth < 0)
		cannot_tell("/proc/thread-self/fail-nth, which takes CONFIG_FAULT_INJECTION");%OPEN%
}

/* From here on the thread's nth allocation fails%LASTS%. */
static void arm(int nth)
{
	char text[16];
	int length = sprintf(text, "%d", nth);

	if (pwrite(fail_nth, text, length, 0) != length)
		cannot_tell("fail-nth");%ARM%
}

/* Whether it came to that allocation. */
static int disarm(void)
{
	char text[16] = "";

%DISARM%	if (pread(fail_nth, text, sizeof(text) - 1, 0) < 1 || pwrite(fail_nth, "0", 1, 0) != 1)
		cannot_tell("fail-nth");
	return atoi(text) == 0;
}""",
    ),
    "race_verdict": (
        (),
        """/* Who wins is luck; only the answer that nobody should get says something. */
static int race_verdict(const char *what, long got, long wrong)
{
	if (got == wrong)
		printf("BUG: %s: %s\\n", what, wrong < 0 ? strerror(-wrong) : "it succeeded");
	return got == wrong;
}""",
    ),
    "too_long": (
        (),
        """static void too_long(int number)
{
	(void)number;
	_exit(4);
}""",
    ),
    "stuck": (
        (),
        """static volatile int asked;

/* A call that does not come back is an answer, too; before it, it is none. */
static void stuck(int number)
{
	(void)number;
	_exit(asked ? 1 : 4);
}""",
    ),
}

# What each program of native/guest_x86_64.c does: the instructions, for the comment beside its bytes.
PROGRAMS: Final[dict[str, str]] = {
    "load1": "movzbl (%rdi), %eax; REPORT",
    "load2": "movzwl (%rdi), %eax; REPORT",
    "load4": "movl (%rdi), %eax; REPORT",
    "load8": "movq (%rdi), %rax; REPORT",
    "store1": "movb %sil, (%rdi); REPORT",
    "store2": "movw %si, (%rdi); REPORT",
    "store4": "movl %esi, (%rdi); REPORT",
    "store8": "movq %rsi, (%rdi); REPORT",
    "store_each": "1: movq %rsi, (%rdi); addq %rdx, %rdi; incq %rsi; decq %rcx; jnz 1b; REPORT",
    "check_each": "1: movq (%rdi), %rax; cmpq %rsi, %rax; jne 2f; addq %rdx, %rdi; incq %rsi; decq %rcx; jnz 1b; 2: REPORT",
    "check_same": "1: movq (%rdi), %rax; cmpq %rsi, %rax; jne 2f; addq %rdx, %rdi; decq %rcx; jnz 1b; 2: REPORT",
    "jump": "jmp *%rdi",
    "report": "REPORT",
    "spin": "1: incq %rax; jmp 1b",
    "watch": "1: movq (%rdi), %rax; incq %rcx; cmpq %rsi, %rax; je 1b; cmpq %rdx, %rax; je 1b; REPORT",
    "hammer": "1: incq %rax; movq %rax, (%rdi); jmp 1b",
    "await": "1: pause; movq (%rdi), %rax; cmpq %rsi, %rax; je 1b; REPORT",
    "load_when": "load (rdi), telling it at rsi + 8, until (rsi) is not 0; then load (rdi) once more; REPORT",
    "patrol": "over the pages of [r8, r9) for ever: report what is neither 0, rsi nor rdx; store rbx, unless 0, where 0 is",
    "outs": "cld; rep outsb; REPORT",
    "movs8": "cld; movsq; REPORT",
    "store8_jump": "movq %rsi, (%rdi); jmp *%rdx",
    "undefined": "ud2; REPORT",
    "halt": "1: hlt; jmp 1b",
    "vmcall": "vmcall; REPORT",
    "vmmcall": "vmmcall; REPORT",
}
REPORT: Final = "1: outl %eax, $0x10; jmp 1b"

ROUNDS: Final = """int main(void)
{
	time_t end = time(NULL) + 20;
	int status;

	signal(SIGALRM, too_long);
	alarm(60);
	do {
		pid_t child = must(fork(), "fork");

		if (!child)
			exit(one_round());
		status = end_of(child);
	} while (!status && time(NULL) < end);
	if (!status)
		printf("OK: never seen in 20 s\\n");
	return status;
}"""

OUTLIVES: Final = """int main(void)
{
	pid_t child;
	int status;

	signal(SIGALRM, too_long);
	alarm(60);
%DIRECTORY%
	child = must(fork(), "fork");
	if (!child)
		exit(all_calls());
	status = end_of(child);
	if (status)
		return status;
%ASK%
}"""

MOMENTARY: Final = {"TASK_FILTER": "N", "PROBABILITY": "", "OPEN": "", "LASTS": "", "ARM": "", "DISARM": ""}
LASTING: Final = {
    "TASK_FILTER": "Y",
    "PROBABILITY": """
	set_knob("probability", "100"); /* of marked threads */""",
    "OPEN": """
	make_it_fail = open("/proc/thread-self/make-it-fail", O_RDWR);
	if (make_it_fail < 0)
		cannot_tell("/proc/thread-self/make-it-fail");""",
    "LASTS": ", and 64 of each sort after it",
    "ARM": """
	if (pwrite(make_it_fail, "1", 1, 0) != 1)
		cannot_tell("make-it-fail");""",
    "DISARM": """	if (pwrite(make_it_fail, "0", 1, 0) != 1)
		cannot_tell("make-it-fail");
""",
}
"""What makes the one sort of shortage or the other of the helper."""

SHORT_ROUNDS: Final = """/* Each time another allocation of the one call fails, until it needs no more. */
int main(void)
{
	int told = 0, status = 0;

	for (int nth = 1; nth < 10000; nth++) {
		pid_t child = must(fork(), "fork");

		if (!child)
			exit(one_round(nth));
		status = end_of(child);
		set_knob("probability", "0");
		if (status == UNTOUCHED)
			break;
		if (status == 1)
			printf("so it is when allocation %d of the call fails\\n", nth);
		if (status == 1 || status == 4)
			return status;
		told += status == 0;
	}
	if (!told)
		cannot_tell("no failing allocation leads to the question");
	printf("OK: %d allocations failed, and all was well\\n", told);
	return 0;
}"""

KVM_RUN_PAGE: Final = """/* The page shared with a vCPU, as far as it is read here. */
struct kvm_run {
	uint8_t request_interrupt_window, immediate_exit, padding[6];
	uint32_t exit_reason;
	uint8_t padding2[20];
	union {
		struct {
			uint8_t direction, size;
			uint16_t port;
			uint32_t count;
			uint64_t data_offset;
		} io;
		struct {
			uint64_t phys_addr;
			uint8_t data[8];
			uint32_t len;
			uint8_t is_write;
		} mmio;
		struct {
			uint64_t nr, args[6], ret, flags;
		} hypercall;
		struct {
			uint64_t flags, gpa, size;
		} memory_fault;
	};
};"""
