/* kvm_abi_aarch64.h - what only arm64 has in KVM's userspace ABI. See kvm_abi.h for how these files are read. */
#ifndef KVMGMEM_KVM_ABI_AARCH64_H
#define KVMGMEM_KVM_ABI_AARCH64_H

#include <stdint.h>

/* KVM_CREATE_VM's argument: the size of the IPA space in bits 0..7 (0 means 40), bit 31 a protected VM (7.3). */
#define KVM_VM_TYPE_ARM_PROTECTED 0x80000000UL

#define KVM_ARM_VCPU_INIT 0x4020aeaeUL
#define KVM_ARM_PREFERRED_TARGET 0x8020aeafUL

struct kvm_vcpu_init {
	uint32_t target;
	uint32_t features[7];
};

#define KVMGMEM_ARM_IOCTL_CARRIES(number, type) \
	_Static_assert((((number) >> 16) & 0x3fff) == sizeof(type), #number " does not carry the size of " #type)

KVMGMEM_ARM_IOCTL_CARRIES(KVM_ARM_VCPU_INIT, struct kvm_vcpu_init);
KVMGMEM_ARM_IOCTL_CARRIES(KVM_ARM_PREFERRED_TARGET, struct kvm_vcpu_init);

#endif
