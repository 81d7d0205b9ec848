/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the tracer and qvis share: a file that both map, and the records that
 * the tracer writes. qvis/trace/tcg.py has the same layout in Python; change
 * QVIS_VERSION in both with any of it.
 */
#ifndef QVIS_CONTROL_H
#define QVIS_CONTROL_H

#include <stdint.h>

#define QVIS_MAGIC 0x4352545349565100ull /* "\0QVISTRC" */
#define QVIS_VERSION 1

#define QVIS_MAX_FUNCTIONS 128
#define QVIS_MAX_VCPUS 1024
#define QVIS_MAX_PATH 1024

/* What this build of the tracer can see, in qvis_control.sees. */
#define QVIS_SEES_ACCESSES (1u << 0)   /* by QEMU's callback for device accesses */
#define QVIS_SEES_PORTS (1u << 1)      /* the same for I/O ports */
#define QVIS_SEES_INTERRUPTS (1u << 2) /* by the discontinuity callback */

enum qvis_state {
	QVIS_IDLE,
	QVIS_RECORDING,
};

struct qvis_vcpu_counts {
	uint64_t recorded;
	uint64_t dropped;
};

/*
 * qvis fills folder and functions, sets want and raises request; the tracer
 * answers at the next interrupt or device access of any vCPU by setting state
 * and then answered to the same number. Nothing else is written by both.
 */
struct qvis_control {
	/* written by the tracer when it is loaded */
	uint64_t magic;
	uint32_t version;
	uint32_t sees;
	/* written by qvis */
	uint32_t request;
	uint32_t want; /* QVIS_IDLE or QVIS_RECORDING */
	uint32_t nr_functions;
	uint32_t reserved;
	/*
	 * ns, CLOCK_MONOTONIC: qvis moves it ahead while it lives, and the tracer
	 * stops when it has passed, rather than fill a disk for nobody. 0: never.
	 */
	uint64_t lease;
	uint64_t functions[QVIS_MAX_FUNCTIONS]; /* virtual addresses */
	char folder[QVIS_MAX_PATH];
	/* written by the tracer */
	uint32_t answered;
	uint32_t state;
	int32_t error; /* errno of the first file that could not be made or grown */
	uint32_t nr_vcpus;
	struct qvis_vcpu_counts vcpus[QVIS_MAX_VCPUS];
};

enum qvis_kind {
	QVIS_HEADER, /* the first record of each file */
	QVIS_ACCESS, /* a: address, b: value */
	QVIS_INTERRUPT, /* a: from this PC, b: to this one */
	QVIS_FUNCTION, /* a: its first argument, b: its index in functions */
};

#define QVIS_STORE (1u << 0)
#define QVIS_PORT (1u << 1)

/* The header has the magic in a, and vCPU << 32 | version in b. */
struct qvis_record {
	uint64_t time; /* ns, CLOCK_MONOTONIC */
	uint64_t clock; /* instructions that this vCPU has begun since the start (tracer.c) */
	uint64_t a;
	uint64_t b;
	uint8_t kind;
	uint8_t size; /* bytes */
	uint8_t flags;
	uint8_t pad[5];
};

#endif
