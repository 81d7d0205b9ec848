// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Tells what the host's KVM can do, or why it can do nothing.
 *
 * With capability numbers as arguments, prints one line with the value of each
 * (Documentation/virt/kvm/api.rst, KVM_CHECK_EXTENSION); without, that KVM works.
 * Exit status 1 and the reason on standard output when it does not.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

/* The only version since Linux 2.6.22. */
#define API_VERSION 12

int main(int argc, char **argv)
{
    int kvm, version, vm;

    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) {
        printf("no KVM: /dev/kvm: %s\n", strerror(errno));
        return 1;
    }
    version = ioctl(kvm, KVM_GET_API_VERSION, 0);
    if (version != API_VERSION) {
        printf("KVM speaks version %d of its interface, not %d\n", version, API_VERSION);
        return 1;
    }
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0) {
        printf("KVM makes no virtual machine: %s\n", strerror(errno));
        return 1;
    }
    if (argc < 2)
        printf("KVM works");
    for (int i = 1; i < argc; i++) {
        int value = ioctl(vm, KVM_CHECK_EXTENSION, strtoul(argv[i], NULL, 0));

        printf("%s%d", i > 1 ? " " : "", value);
    }
    printf("\n");
    return 0;
}
