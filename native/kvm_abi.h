/*
 * kvm_abi.h - the part of KVM's userspace ABI that the guest_memfd contract touches.
 *
 * Written from the numbers, because no distribution's <linux/kvm.h> is new enough. The ioctl numbers are literals, and the
 * size that each number carries (bits 16..29) is asserted against its structure, so that a wrong field cannot go unnoticed.
 * build_native.py reads this file twice: the C compiler gets all of it, cffi gets the `#define` names and the structures.
 * To stay readable for both, structures hold plain fixed-width members and array lengths are literals.
 *
 * Linux 7.3.4 is the reference; the comment behind a group names the release that brought it.
 */
#ifndef KVMGMEM_KVM_ABI_H
#define KVMGMEM_KVM_ABI_H

#include <stdint.h>

#if defined(__x86_64__)
#include "kvm_abi_x86_64.h"
#elif defined(__aarch64__)
#include "kvm_abi_aarch64.h"
#else
#error "kvmgmem knows x86-64 and arm64"
#endif

#define KVM_API_VERSION 12

/* -- ioctls on /dev/kvm ------------------------------------------------------------------------------------------- */
#define KVM_GET_API_VERSION 0x0000ae00UL
#define KVM_CREATE_VM 0x0000ae01UL
#define KVM_CHECK_EXTENSION 0x0000ae03UL /* also on a VM since KVM_CAP_CHECK_EXTENSION_VM */
#define KVM_GET_VCPU_MMAP_SIZE 0x0000ae04UL

/* -- ioctls on a VM ----------------------------------------------------------------------------------------------- */
#define KVM_CREATE_VCPU 0x0000ae41UL
#define KVM_GET_DIRTY_LOG 0x4010ae42UL
#define KVM_SET_USER_MEMORY_REGION 0x4020ae46UL
#define KVM_SET_USER_MEMORY_REGION2 0x40a0ae49UL /* 6.8 */
#define KVM_CREATE_IRQCHIP 0x0000ae60UL
#define KVM_ENABLE_CAP 0x4068aea3UL /* also on a vCPU */
#define KVM_CLEAR_DIRTY_LOG 0xc018aec0UL
#define KVM_RESET_DIRTY_RINGS 0x0000aec7UL
#define KVM_GET_STATS_FD 0x0000aeceUL /* also on a vCPU */
#define KVM_SET_MEMORY_ATTRIBUTES 0x4020aed2UL /* 6.8 */
#define KVM_CREATE_GUEST_MEMFD 0xc040aed4UL /* 6.8 */
#define KVM_CREATE_DEVICE 0xc00caee0UL

/* -- ioctls on a vCPU --------------------------------------------------------------------------------------------- */
#define KVM_RUN 0x0000ae80UL
#define KVM_SET_SIGNAL_MASK 0x4004ae8bUL
#define KVM_GET_MP_STATE 0x8004ae98UL
#define KVM_SET_MP_STATE 0x4004ae99UL
#define KVM_GET_ONE_REG 0x4010aeabUL
#define KVM_SET_ONE_REG 0x4010aeacUL
#define KVM_PRE_FAULT_MEMORY 0xc040aed5UL /* 6.11 */

/* -- capabilities ------------------------------------------------------------------------------------------------- */
#define KVM_CAP_USER_MEMORY 3
#define KVM_CAP_NR_VCPUS 9
#define KVM_CAP_NR_MEMSLOTS 10
#define KVM_CAP_SYNC_MMU 16
#define KVM_CAP_MAX_VCPUS 66
#define KVM_CAP_ONE_REG 70
#define KVM_CAP_READONLY_MEM 81
#define KVM_CAP_CHECK_EXTENSION_VM 105
#define KVM_CAP_DISABLE_QUIRKS 116
#define KVM_CAP_X86_SMM 117
#define KVM_CAP_MULTI_ADDRESS_SPACE 118
#define KVM_CAP_IMMEDIATE_EXIT 136
#define KVM_CAP_NESTED_STATE 157
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 168
#define KVM_CAP_DIRTY_LOG_RING 192
#define KVM_CAP_VM_COPY_ENC_CONTEXT_FROM 197
#define KVM_CAP_EXIT_HYPERCALL 201
#define KVM_CAP_BINARY_STATS_FD 203
#define KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM 206
#define KVM_CAP_VM_GPA_BITS 207
#define KVM_CAP_DISABLE_QUIRKS2 213
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP 225
#define KVM_CAP_USER_MEMORY2 231 /* 6.8 */
#define KVM_CAP_MEMORY_FAULT_INFO 232 /* 6.8 */
#define KVM_CAP_MEMORY_ATTRIBUTES 233 /* 6.8 */
#define KVM_CAP_GUEST_MEMFD 234 /* 6.8 */
#define KVM_CAP_VM_TYPES 235 /* 6.8 */
#define KVM_CAP_PRE_FAULT_MEMORY 236 /* 6.11 */
#define KVM_CAP_GUEST_MEMFD_FLAGS 244 /* 6.18 */

/* -- memory slots, guest_memfd, memory attributes ----------------------------------------------------------------- */
#define KVM_MEM_LOG_DIRTY_PAGES 0x1UL
#define KVM_MEM_READONLY 0x2UL
#define KVM_MEM_GUEST_MEMFD 0x4UL /* 6.8 */
#define GUEST_MEMFD_FLAG_MMAP 0x1ULL /* 6.18 */
#define GUEST_MEMFD_FLAG_INIT_SHARED 0x2ULL /* 6.18 */
#define KVM_MEMORY_ATTRIBUTE_PRIVATE 0x8ULL
#define KVM_MEMORY_EXIT_FLAG_PRIVATE 0x8ULL
#define KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE 1
#define KVM_DIRTY_LOG_INITIALLY_SET 2
#define KVM_DIRTY_GFN_F_DIRTY 1
#define KVM_DIRTY_GFN_F_RESET 2

/* -- exits -------------------------------------------------------------------------------------------------------- */
#define KVM_EXIT_UNKNOWN 0
#define KVM_EXIT_EXCEPTION 1
#define KVM_EXIT_IO 2
#define KVM_EXIT_HYPERCALL 3
#define KVM_EXIT_DEBUG 4
#define KVM_EXIT_HLT 5
#define KVM_EXIT_MMIO 6
#define KVM_EXIT_IRQ_WINDOW_OPEN 7
#define KVM_EXIT_SHUTDOWN 8
#define KVM_EXIT_FAIL_ENTRY 9
#define KVM_EXIT_INTR 10
#define KVM_EXIT_INTERNAL_ERROR 17
#define KVM_EXIT_SYSTEM_EVENT 24
#define KVM_EXIT_ARM_NISV 28
#define KVM_EXIT_DIRTY_RING_FULL 31
#define KVM_EXIT_MEMORY_FAULT 39 /* 6.8 */
#define KVM_EXIT_TDX 40 /* 6.16 */
#define KVM_EXIT_ARM_SEA 41
#define KVM_EXIT_IO_IN 0
#define KVM_EXIT_IO_OUT 1
#define KVM_INTERNAL_ERROR_EMULATION 1
#define KVM_INTERNAL_ERROR_SIMUL_EX 2
#define KVM_INTERNAL_ERROR_DELIVERY_EV 3
#define KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON 4
#define KVM_SYSTEM_EVENT_SHUTDOWN 1
#define KVM_SYSTEM_EVENT_RESET 2
#define KVM_SYSTEM_EVENT_CRASH 3
#define KVM_SYSTEM_EVENT_SEV_TERM 6
#define KVM_SYSTEM_EVENT_TDX_FATAL 7

/* -- hypercalls that a guest makes to change its memory ------------------------------------------------------------ */
#define KVM_HC_MAP_GPA_RANGE 12
#define KVM_MAP_GPA_RANGE_ENCRYPTED 0x10
#define KVM_MAP_GPA_RANGE_DECRYPTED 0x0

struct kvm_userspace_memory_region {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
};

struct kvm_userspace_memory_region2 {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
	uint64_t guest_memfd_offset;
	uint32_t guest_memfd;
	uint32_t pad1;
	uint64_t pad2[14];
};

struct kvm_create_guest_memfd {
	uint64_t size;
	uint64_t flags;
	uint64_t reserved[6];
};

struct kvm_memory_attributes {
	uint64_t address;
	uint64_t size;
	uint64_t attributes;
	uint64_t flags;
};

struct kvm_pre_fault_memory {
	uint64_t gpa;
	uint64_t size;
	uint64_t flags;
	uint64_t padding[5];
};

struct kvm_enable_cap {
	uint32_t cap;
	uint32_t flags;
	uint64_t args[4];
	uint8_t pad[64];
};

struct kvm_dirty_log {
	uint32_t slot;
	uint32_t padding1;
	uint64_t dirty_bitmap; /* address of one bit per page */
};

struct kvm_clear_dirty_log {
	uint32_t slot;
	uint32_t num_pages;
	uint64_t first_page;
	uint64_t dirty_bitmap; /* address of one bit per page */
};

struct kvm_dirty_gfn {
	uint32_t flags;
	uint32_t slot;
	uint64_t offset;
};

struct kvm_one_reg {
	uint64_t id;
	uint64_t addr;
};

struct kvm_mp_state {
	uint32_t mp_state;
};

struct kvm_signal_mask {
	uint32_t len;
	uint8_t sigset[];
};

struct kvm_create_device {
	uint32_t type;
	uint32_t fd;
	uint32_t flags;
};

struct kvm_stats_header {
	uint32_t flags;
	uint32_t name_size;
	uint32_t num_desc;
	uint32_t id_offset;
	uint32_t desc_offset;
	uint32_t data_offset;
};

struct kvm_stats_desc {
	uint32_t flags;
	int16_t exponent;
	uint16_t size;
	uint32_t offset;
	uint32_t bucket_size;
	char name[];
};

/* The page shared with a vCPU. Only the exits that the contract can meet have a name in the union. */
struct kvm_run {
	uint8_t request_interrupt_window;
	uint8_t immediate_exit;
	uint8_t padding1[6];
	uint32_t exit_reason;
	uint8_t ready_for_interrupt_injection;
	uint8_t if_flag;
	uint16_t flags;
	uint64_t cr8;
	uint64_t apic_base;
	union {
		struct {
			uint64_t hardware_exit_reason;
		} hw;
		struct {
			uint64_t hardware_entry_failure_reason;
			uint32_t cpu;
		} fail_entry;
		struct {
			uint8_t direction;
			uint8_t size;
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
			uint64_t nr;
			uint64_t args[6];
			uint64_t ret;
			uint64_t flags;
		} hypercall;
		struct {
			uint32_t suberror;
			uint32_t ndata;
			uint64_t data[16];
		} internal;
		struct {
			uint32_t type;
			uint32_t ndata;
			uint64_t data[16];
		} system_event;
		struct {
			uint64_t flags;
			uint64_t gpa;
			uint64_t size;
		} memory_fault;
		struct {
			uint64_t esr_iss;
			uint64_t fault_ipa;
		} arm_nisv;
		struct {
			uint64_t flags;
			uint64_t esr;
			uint64_t gva;
			uint64_t gpa;
		} arm_sea;
		uint8_t padding[256];
	};
	uint64_t kvm_valid_regs;
	uint64_t kvm_dirty_regs;
	uint8_t sync_regs[2048];
};

/* Not KVM's, but wanted beside it: cachestat(2), Linux 6.5. */
struct kvmgmem_cachestat_range {
	uint64_t off;
	uint64_t len;
};

struct kvmgmem_cachestat {
	uint64_t nr_cache;
	uint64_t nr_dirty;
	uint64_t nr_writeback;
	uint64_t nr_evicted;
	uint64_t nr_recently_evicted;
};

#define KVMGMEM_IOCTL_CARRIES(number, type) \
	_Static_assert((((number) >> 16) & 0x3fff) == sizeof(type), #number " does not carry the size of " #type)

KVMGMEM_IOCTL_CARRIES(KVM_GET_DIRTY_LOG, struct kvm_dirty_log);
KVMGMEM_IOCTL_CARRIES(KVM_SET_USER_MEMORY_REGION, struct kvm_userspace_memory_region);
KVMGMEM_IOCTL_CARRIES(KVM_SET_USER_MEMORY_REGION2, struct kvm_userspace_memory_region2);
KVMGMEM_IOCTL_CARRIES(KVM_ENABLE_CAP, struct kvm_enable_cap);
KVMGMEM_IOCTL_CARRIES(KVM_CLEAR_DIRTY_LOG, struct kvm_clear_dirty_log);
KVMGMEM_IOCTL_CARRIES(KVM_SET_MEMORY_ATTRIBUTES, struct kvm_memory_attributes);
KVMGMEM_IOCTL_CARRIES(KVM_CREATE_GUEST_MEMFD, struct kvm_create_guest_memfd);
KVMGMEM_IOCTL_CARRIES(KVM_CREATE_DEVICE, struct kvm_create_device);
KVMGMEM_IOCTL_CARRIES(KVM_SET_SIGNAL_MASK, struct kvm_signal_mask);
KVMGMEM_IOCTL_CARRIES(KVM_GET_MP_STATE, struct kvm_mp_state);
KVMGMEM_IOCTL_CARRIES(KVM_SET_MP_STATE, struct kvm_mp_state);
KVMGMEM_IOCTL_CARRIES(KVM_GET_ONE_REG, struct kvm_one_reg);
KVMGMEM_IOCTL_CARRIES(KVM_SET_ONE_REG, struct kvm_one_reg);
KVMGMEM_IOCTL_CARRIES(KVM_PRE_FAULT_MEMORY, struct kvm_pre_fault_memory);
_Static_assert(sizeof(struct kvm_run) == 2352, "kvm_run is 2352 bytes on x86-64 and arm64 (2048 of them sync_regs)");

#endif
