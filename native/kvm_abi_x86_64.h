/* kvm_abi_x86_64.h - what only x86-64 has in KVM's userspace ABI. See kvm_abi.h for how these files are read. */
#ifndef KVMGMEM_KVM_ABI_X86_64_H
#define KVMGMEM_KVM_ABI_X86_64_H

#include <stdint.h>

/* -- VM types: the argument of KVM_CREATE_VM ----------------------------------------------------------------------- */
#define KVM_X86_DEFAULT_VM 0
#define KVM_X86_SW_PROTECTED_VM 1 /* 6.8 */
#define KVM_X86_SEV_VM 2 /* 6.10 */
#define KVM_X86_SEV_ES_VM 3 /* 6.10 */
#define KVM_X86_SNP_VM 4 /* 6.11 */
#define KVM_X86_TDX_VM 5 /* 6.16 */

/* -- ioctls -------------------------------------------------------------------------------------------------------- */
#define KVM_GET_SUPPORTED_CPUID 0xc008ae05UL
#define KVM_SET_TSS_ADDR 0x0000ae47UL
#define KVM_SET_IDENTITY_MAP_ADDR 0x4008ae48UL
#define KVM_GET_REGS 0x8090ae81UL
#define KVM_SET_REGS 0x4090ae82UL
#define KVM_GET_SREGS 0x8138ae83UL
#define KVM_SET_SREGS 0x4138ae84UL
#define KVM_TRANSLATE 0xc018ae85UL
#define KVM_GET_MSRS 0xc008ae88UL
#define KVM_SET_MSRS 0x4008ae89UL
#define KVM_SET_CPUID2 0x4008ae90UL
#define KVM_GET_VCPU_EVENTS 0x8040ae9fUL
#define KVM_SET_VCPU_EVENTS 0x4040aea0UL
#define KVM_SMI 0x0000aeb7UL
#define KVM_MEMORY_ENCRYPT_OP 0xc008aebaUL
#define KVM_MEMORY_ENCRYPT_REG_REGION 0x8010aebbUL
#define KVM_MEMORY_ENCRYPT_UNREG_REGION 0x8010aebcUL

/* -- quirks that KVM_CAP_DISABLE_QUIRKS2 switches off --------------------------------------------------------------- */
#define KVM_X86_QUIRK_SLOT_ZAP_ALL 0x80UL /* 6.12 */

/* -- exits ---------------------------------------------------------------------------------------------------------- */
#define KVM_EXIT_HYPERCALL_LONG_MODE 0x1ULL

/* -- commands of KVM_MEMORY_ENCRYPT_OP ------------------------------------------------------------------------------ */
#define KVM_SEV_LAUNCH_START 2
#define KVM_SEV_INIT2 22
#define KVM_SEV_SNP_LAUNCH_START 100
#define KVM_SEV_SNP_LAUNCH_UPDATE 101
#define KVM_SEV_SNP_LAUNCH_FINISH 102
#define KVM_SEV_SNP_PAGE_TYPE_NORMAL 1
#define KVM_SEV_SNP_PAGE_TYPE_ZERO 3
#define KVM_SEV_SNP_PAGE_TYPE_CPUID 6
#define KVM_TDX_CAPABILITIES 0
#define KVM_TDX_INIT_VM 1
#define KVM_TDX_INIT_VCPU 2
#define KVM_TDX_INIT_MEM_REGION 3
#define KVM_TDX_FINALIZE_VM 4

struct kvm_regs {
	uint64_t rax, rbx, rcx, rdx;
	uint64_t rsi, rdi, rsp, rbp;
	uint64_t r8, r9, r10, r11;
	uint64_t r12, r13, r14, r15;
	uint64_t rip, rflags;
};

struct kvm_segment {
	uint64_t base;
	uint32_t limit;
	uint16_t selector;
	uint8_t type;
	uint8_t present, dpl, db, s, l, g, avl;
	uint8_t unusable;
	uint8_t padding;
};

struct kvm_dtable {
	uint64_t base;
	uint16_t limit;
	uint16_t padding[3];
};

struct kvm_sregs {
	struct kvm_segment cs, ds, es, fs, gs, ss;
	struct kvm_segment tr, ldt;
	struct kvm_dtable gdt, idt;
	uint64_t cr0, cr2, cr3, cr4, cr8;
	uint64_t efer;
	uint64_t apic_base;
	uint64_t interrupt_bitmap[4];
};

struct kvm_translation {
	uint64_t linear_address;
	uint64_t physical_address;
	uint8_t valid;
	uint8_t writeable;
	uint8_t usermode;
	uint8_t pad[5];
};

struct kvm_cpuid_entry2 {
	uint32_t function;
	uint32_t index;
	uint32_t flags;
	uint32_t eax;
	uint32_t ebx;
	uint32_t ecx;
	uint32_t edx;
	uint32_t padding[3];
};

struct kvm_cpuid2 {
	uint32_t nent;
	uint32_t padding;
	struct kvm_cpuid_entry2 entries[];
};

struct kvm_msr_entry {
	uint32_t index;
	uint32_t reserved;
	uint64_t data;
};

struct kvm_msrs {
	uint32_t nmsrs;
	uint32_t pad;
	struct kvm_msr_entry entries[];
};

struct kvm_vcpu_events {
	struct {
		uint8_t injected;
		uint8_t nr;
		uint8_t has_error_code;
		uint8_t pending;
		uint32_t error_code;
	} exception;
	struct {
		uint8_t injected;
		uint8_t nr;
		uint8_t soft;
		uint8_t shadow;
	} interrupt;
	struct {
		uint8_t injected;
		uint8_t pending;
		uint8_t masked;
		uint8_t pad;
	} nmi;
	uint32_t sipi_vector;
	uint32_t flags;
	struct {
		uint8_t smm;
		uint8_t pending;
		uint8_t smm_inside_nmi;
		uint8_t latched_init;
	} smi;
	struct {
		uint8_t pending;
	} triple_fault;
	uint8_t reserved[26];
	uint8_t exception_has_payload;
	uint64_t exception_payload;
};

struct kvm_enc_region {
	uint64_t addr;
	uint64_t size;
};

struct kvm_sev_cmd {
	uint32_t id;
	uint32_t pad0;
	uint64_t data;
	uint32_t error;
	uint32_t sev_fd;
};

struct kvm_sev_init {
	uint64_t vmsa_features;
	uint32_t flags;
	uint16_t ghcb_version;
	uint16_t pad1;
	uint32_t pad2[8];
};

struct kvm_sev_snp_launch_start {
	uint64_t policy;
	uint8_t gosvw[16];
	uint16_t flags;
	uint8_t pad0[6];
	uint64_t pad1[4];
};

struct kvm_sev_snp_launch_update {
	uint64_t gfn_start;
	uint64_t uaddr;
	uint64_t len;
	uint8_t type;
	uint8_t pad0;
	uint16_t flags;
	uint32_t pad1;
	uint64_t pad2[4];
};

struct kvm_sev_snp_launch_finish {
	uint64_t id_block_uaddr;
	uint64_t id_auth_uaddr;
	uint8_t id_block_en;
	uint8_t auth_key_en;
	uint8_t vcek_disabled;
	uint8_t host_data[32];
	uint8_t pad0[3];
	uint16_t flags;
	uint64_t pad1[4];
};

struct kvm_tdx_cmd {
	uint32_t id;
	uint32_t flags;
	uint64_t data;
	uint64_t hw_error;
};

struct kvm_tdx_init_mem_region {
	uint64_t source_addr;
	uint64_t gpa;
	uint64_t nr_pages;
};

#define KVMGMEM_X86_IOCTL_CARRIES(number, type) \
	_Static_assert((((number) >> 16) & 0x3fff) == sizeof(type), #number " does not carry the size of " #type)

KVMGMEM_X86_IOCTL_CARRIES(KVM_GET_SUPPORTED_CPUID, struct kvm_cpuid2);
KVMGMEM_X86_IOCTL_CARRIES(KVM_SET_CPUID2, struct kvm_cpuid2);
KVMGMEM_X86_IOCTL_CARRIES(KVM_SET_IDENTITY_MAP_ADDR, uint64_t);
KVMGMEM_X86_IOCTL_CARRIES(KVM_GET_REGS, struct kvm_regs);
KVMGMEM_X86_IOCTL_CARRIES(KVM_SET_REGS, struct kvm_regs);
KVMGMEM_X86_IOCTL_CARRIES(KVM_GET_SREGS, struct kvm_sregs);
KVMGMEM_X86_IOCTL_CARRIES(KVM_SET_SREGS, struct kvm_sregs);
KVMGMEM_X86_IOCTL_CARRIES(KVM_TRANSLATE, struct kvm_translation);
KVMGMEM_X86_IOCTL_CARRIES(KVM_GET_MSRS, struct kvm_msrs);
KVMGMEM_X86_IOCTL_CARRIES(KVM_SET_MSRS, struct kvm_msrs);
KVMGMEM_X86_IOCTL_CARRIES(KVM_GET_VCPU_EVENTS, struct kvm_vcpu_events);
KVMGMEM_X86_IOCTL_CARRIES(KVM_SET_VCPU_EVENTS, struct kvm_vcpu_events);
KVMGMEM_X86_IOCTL_CARRIES(KVM_MEMORY_ENCRYPT_REG_REGION, struct kvm_enc_region);
KVMGMEM_X86_IOCTL_CARRIES(KVM_MEMORY_ENCRYPT_UNREG_REGION, struct kvm_enc_region);
/* KVM_MEMORY_ENCRYPT_OP carries an unsigned long although it takes a pointer to struct kvm_sev_cmd or kvm_tdx_cmd. */
KVMGMEM_X86_IOCTL_CARRIES(KVM_MEMORY_ENCRYPT_OP, uint64_t);

#endif
