// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qvis's TCG plugin: what a guest does to devices, and what it is interrupted
 * by, with the instruction count of the vCPU beside each.
 *
 *	-plugin file=libtracer.so,control=FILE
 *
 * Instructions are counted as -icount does: all of a translated block when a vCPU
 * enters it, less those that it does not get to. Where QEMU does not tell plugins
 * of that, each is counted by itself, at three times the cost.
 *
 * It is loaded with every machine and sleeps: two callbacks that look at a flag
 * when a vCPU touches a device or takes an interrupt, and an empty one. Translated
 * code is instrumented, and translated anew, only while a recording runs.
 *
 * Each vCPU writes to a file of its own, by way of a mapping that grows by a
 * segment at a time. Nothing has to be flushed, so whatever happens to QEMU
 * what was recorded stays; and no vCPU waits for another. An event for which
 * there is no room, on a full disk, is counted.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <glib.h>
#include <qemu/qemu-plugin.h>

#include "control.h"

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

/* A multiple of the page size: 40 bytes a record, 1.25 MiB a segment. */
#define SEGMENT_RECORDS 32768
#define SEGMENT_BYTES (SEGMENT_RECORDS * sizeof(struct qvis_record))

/* Where a function begins in a block: what to record, and what of the block is left. */
struct entry {
	uint32_t function; /* index */
	uint32_t left; /* instructions that follow */
};

struct vcpu {
	uint64_t instructions; /* counted by translated code */
	struct qvis_record *segment;
	uint64_t used; /* records in it */
	uint64_t segments; /* that the file has */
	int fd; /* plus one: 0 is none */
	bool full; /* no room for another segment */
	struct qemu_plugin_register *argument;
};

static struct qvis_control *control;
static struct qemu_plugin_scoreboard *vcpus;
static qemu_plugin_u64 instructions;
static GHashTable *functions; /* address -> index + 1 */
static GHashTable *entries; /* of struct entry */
static GMutex entries_lock;
static bool recording; /* changes only while no vCPU runs */
static bool resetting;
static bool expired; /* the lease has */
/* That of this recording: qvis may be filling in the next one's already. */
static char folder[QVIS_MAX_PATH];
static qemu_plugin_id_t plugin_id;

static void register_callbacks(void);
static void answer(qemu_plugin_id_t id);

/* Called on a vCPU, which QEMU needs for a reset. */
static void reset(void)
{
	if (!__atomic_exchange_n(&resetting, true, __ATOMIC_ACQ_REL))
		qemu_plugin_reset(plugin_id, answer);
}

/* A file could not be made or grown: the first reason is the one to tell. */
static void failed(int error)
{
	int32_t none = 0;

	__atomic_compare_exchange_n(&control->error, &none, error, false,
				    __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

static bool grow(struct vcpu *vcpu, unsigned int index)
{
	off_t at = vcpu->segments * SEGMENT_BYTES;
	void *mapping;
	int error;

	if (vcpu->full)
		return false;
	vcpu->full = true; /* until it has worked */
	if (!vcpu->fd) {
		g_autofree char *path = g_strdup_printf("%s/vcpu-%04u.bin", folder, index);
		int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);

		if (fd < 0) {
			failed(errno);
			return false;
		}
		vcpu->fd = fd + 1;
	}
	/* A hole that no block can be found for would kill QEMU with SIGBUS. */
	do
		error = posix_fallocate(vcpu->fd - 1, at, SEGMENT_BYTES);
	while (error == EINTR);
	if (error) {
		failed(error);
		return false;
	}
	mapping = mmap(NULL, SEGMENT_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd - 1, at);
	if (mapping == MAP_FAILED) {
		failed(errno);
		return false;
	}
	if (vcpu->segment)
		munmap(vcpu->segment, SEGMENT_BYTES);
	vcpu->segment = mapping;
	vcpu->used = 0;
	vcpu->segments++;
	vcpu->full = false;
	if (vcpu->segments == 1) {
		struct qvis_record *header = &vcpu->segment[vcpu->used++];

		header->kind = QVIS_HEADER;
		header->a = QVIS_MAGIC;
		header->b = (uint64_t)index << 32 | QVIS_VERSION;
	}
	return true;
}

static void record(unsigned int index, enum qvis_kind kind, unsigned int size, unsigned int flags,
		   uint64_t a, uint64_t b, unsigned int left)
{
	struct vcpu *vcpu = qemu_plugin_scoreboard_find(vcpus, index);
	struct qvis_vcpu_counts *counts;
	struct qvis_record *next;
	struct timespec now;
	uint64_t time, lease = __atomic_load_n(&control->lease, __ATOMIC_RELAXED);

	if (index >= QVIS_MAX_VCPUS) { /* more than any machine of qvis's, but never silently */
		__atomic_fetch_add(&control->vcpus[QVIS_MAX_VCPUS - 1].dropped, 1,
				   __ATOMIC_RELAXED);
		return;
	}
	clock_gettime(CLOCK_MONOTONIC, &now);
	time = now.tv_sec * 1000000000ull + now.tv_nsec;
	if (G_UNLIKELY(lease && time > lease)) {
		expired = true;
		reset();
		return;
	}
	counts = &control->vcpus[index];
	if ((!vcpu->segment || vcpu->used == SEGMENT_RECORDS) && !grow(vcpu, index)) {
		counts->dropped++;
		return;
	}
	next = &vcpu->segment[vcpu->used++];
	next->time = time;
	next->clock = vcpu->instructions - left;
	next->a = a;
	next->b = b;
	next->size = size;
	next->flags = flags;
	next->kind = kind;
	/* Whoever reads the file meanwhile, or after a crash, trusts this number. */
	__atomic_store_n(&counts->recorded, counts->recorded + 1, __ATOMIC_RELEASE);
}

/* Between recordings: no vCPU runs, so all their files can be ended here. */
static void end_files(void)
{
	int nr = qemu_plugin_num_vcpus();

	for (int index = 0; index < nr; index++) {
		struct vcpu *vcpu = qemu_plugin_scoreboard_find(vcpus, index);

		if (vcpu->segment) {
			off_t records = (vcpu->segments - 1) * SEGMENT_RECORDS + vcpu->used;

			munmap(vcpu->segment, SEGMENT_BYTES);
			if (ftruncate(vcpu->fd - 1, records * sizeof(struct qvis_record)))
				failed(errno);
		}
		if (vcpu->fd)
			close(vcpu->fd - 1);
		memset(vcpu, 0, sizeof(*vcpu));
	}
}

static void begin(void)
{
	g_hash_table_remove_all(functions);
	for (uint32_t i = 0; i < MIN(control->nr_functions, QVIS_MAX_FUNCTIONS); i++)
		g_hash_table_insert(functions, GSIZE_TO_POINTER(control->functions[i]),
				    GUINT_TO_POINTER(i + 1));
	memset(control->vcpus, 0, sizeof(control->vcpus));
	control->error = 0;
	g_strlcpy(folder, control->folder, sizeof(folder));
}

/*
 * Do what qvis asks for. All vCPUs are stopped, and translated code is thrown
 * away after this, so that it is made again with or without our counting.
 */
static void answer(qemu_plugin_id_t id)
{
	uint32_t request = __atomic_load_n(&control->request, __ATOMIC_ACQUIRE);

	if (recording)
		end_files();
	/* A lease that has passed ends what went on, and not what is asked for since. */
	recording = control->want == QVIS_RECORDING && (!expired || request != control->answered);
	if (recording)
		begin();
	resetting = false;
	expired = false;
	register_callbacks();
	control->nr_vcpus = qemu_plugin_num_vcpus();
	control->state = recording ? QVIS_RECORDING : QVIS_IDLE;
	__atomic_store_n(&control->answered, request, __ATOMIC_RELEASE);
}

static void look_for_requests(void)
{
	if (G_UNLIKELY(__atomic_load_n(&control->request, __ATOMIC_RELAXED) != control->answered))
		reset();
}

#ifdef QVIS_HAVE_IO_CALLBACK
static void on_io(qemu_plugin_id_t id, unsigned int index, enum qemu_plugin_io_space space,
		  uint64_t address, unsigned int size, bool is_store, uint64_t value)
{
	look_for_requests();
	if (recording)
		record(index, QVIS_ACCESS, size,
		       (is_store ? QVIS_STORE : 0) | (space == QEMU_PLUGIN_IO_PORT ? QVIS_PORT : 0),
		       address, value, 0);
}
#else
/*
 * A QEMU that does not tell: ask of each access where it went. Many times slower.
 *
 * qemu_plugin_hwaddr_is_io() knows no device in QEMU 10.2: tlb_plugin_lookup() in
 * accel/tcg/cputlb.c looks for TLB_MMIO in the address of the TLB's entry, but the
 * flag is one of its slow_flags. So know where a microvm has no memory
 * (hw/i386/microvm.c): below 4 GiB, up to its firmware, and far above.
 */
static bool is_device(const struct qemu_plugin_hwaddr *where)
{
	uint64_t address = qemu_plugin_hwaddr_phys_addr(where);

	return qemu_plugin_hwaddr_is_io(where) ||
	       (address >= 0xc0000000ull && address < 0xff000000ull) || address >= 1ull << 39;
}

static void on_memory(unsigned int index, qemu_plugin_meminfo_t info, uint64_t address,
		      void *unused)
{
	struct qemu_plugin_hwaddr *where = qemu_plugin_get_hwaddr(info, address);
	qemu_plugin_mem_value value;
	uint64_t number = 0;

	if (!where || !is_device(where))
		return;
	value = qemu_plugin_mem_get_value(info);
	switch (value.type) {
	case QEMU_PLUGIN_MEM_VALUE_U8:
		number = value.data.u8;
		break;
	case QEMU_PLUGIN_MEM_VALUE_U16:
		number = value.data.u16;
		break;
	case QEMU_PLUGIN_MEM_VALUE_U32:
		number = value.data.u32;
		break;
	case QEMU_PLUGIN_MEM_VALUE_U64:
		number = value.data.u64;
		break;
	case QEMU_PLUGIN_MEM_VALUE_U128:
		number = value.data.u128.low;
		break;
	}
	record(index, QVIS_ACCESS, 1u << qemu_plugin_mem_size_shift(info),
	       qemu_plugin_mem_is_store(info) ? QVIS_STORE : 0,
	       qemu_plugin_hwaddr_phys_addr(where), number, 0);
}
#endif

#ifdef QVIS_HAVE_DISCON_CALLBACK
static void on_interrupt(qemu_plugin_id_t id, unsigned int index,
			 enum qemu_plugin_discon_type type, uint64_t from, uint64_t to)
{
	look_for_requests();
	if (recording)
		record(index, QVIS_INTERRUPT, 0, 0, from, to, 0);
}
#endif

#if !defined(QVIS_HAVE_IO_CALLBACK) || !defined(QVIS_HAVE_DISCON_CALLBACK)
static void on_resume(qemu_plugin_id_t id, unsigned int index)
{
	look_for_requests();
}
#endif

/* The first argument of the System V ABI, by which an interrupt handler knows its IRQ. */
static uint64_t first_argument(struct vcpu *vcpu)
{
	g_autoptr(GByteArray) bytes = g_byte_array_new();
	uint64_t value = 0;

	if (!vcpu->argument) {
		g_autoptr(GArray) registers = qemu_plugin_get_registers();

		for (guint i = 0; i < registers->len; i++) {
			qemu_plugin_reg_descriptor *each =
				&g_array_index(registers, qemu_plugin_reg_descriptor, i);

			if (!strcmp(each->name, "rdi"))
				vcpu->argument = each->handle;
		}
	}
	if (vcpu->argument && qemu_plugin_read_register(vcpu->argument, bytes) > 0)
		memcpy(&value, bytes->data, MIN(bytes->len, sizeof(value)));
	return value;
}

static void on_function(unsigned int index, void *where)
{
	const struct entry *entry = where;

	if (recording)
		record(index, QVIS_FUNCTION, 0, 0,
		       first_argument(qemu_plugin_scoreboard_find(vcpus, index)),
		       entry->function, entry->left);
}

/* One of each kind is enough: blocks are translated again and again. */
static struct entry *entry_of(uint32_t function, uint32_t left)
{
	uint64_t key = (uint64_t)function << 32 | left;
	struct entry *entry;

	g_mutex_lock(&entries_lock);
	entry = g_hash_table_lookup(entries, &key);
	if (!entry) {
		entry = g_new(struct entry, 1);
		*entry = (struct entry){ .function = function, .left = left };
		g_hash_table_insert(entries, g_memdup2(&key, sizeof(key)), entry);
	}
	g_mutex_unlock(&entries_lock);
	return entry;
}

#ifdef QVIS_HAVE_CUT_CALLBACK
#define TO_COME(nr, i) ((nr) - 1 - (i)) /* counted already when the vCPU entered the block */

static void on_cut(qemu_plugin_id_t id, unsigned int index, unsigned int insns)
{
	struct vcpu *vcpu = qemu_plugin_scoreboard_find(vcpus, index);

	if (recording)
		vcpu->instructions -= insns;
}
#else
#define TO_COME(nr, i) 0
#endif

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t nr = qemu_plugin_tb_n_insns(tb);

#ifdef QVIS_HAVE_CUT_CALLBACK
	qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, QEMU_PLUGIN_INLINE_ADD_U64,
							  instructions, nr);
#endif
	for (size_t i = 0; i < nr; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		void *function = g_hash_table_lookup(
			functions, GSIZE_TO_POINTER(qemu_plugin_insn_vaddr(insn)));

#ifndef QVIS_HAVE_CUT_CALLBACK
		qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(
			insn, QEMU_PLUGIN_INLINE_ADD_U64, instructions, 1);
#endif
		if (function)
			qemu_plugin_register_vcpu_insn_exec_cb(
				insn, on_function, QEMU_PLUGIN_CB_R_REGS,
				entry_of(GPOINTER_TO_UINT(function) - 1, TO_COME(nr, i)));
#ifndef QVIS_HAVE_IO_CALLBACK
		qemu_plugin_register_vcpu_mem_cb(insn, on_memory, QEMU_PLUGIN_CB_NO_REGS,
						 QEMU_PLUGIN_MEM_RW, NULL);
#endif
	}
}

/*
 * For QEMU's sake. A translation that ends early, since its code is on a page that
 * is not there, leaves tcg_ctx->plugin_insn behind, and the next one clears it only
 * if there is a callback like this. If there is none any more, it gets operations
 * that nobody replaces, and QEMU crashes (plugin_gen_tb_start() in
 * accel/tcg/plugin-gen.c, QEMU 10.2).
 */
static void on_translation_unrecorded(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
}

static void register_callbacks(void)
{
	qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, recording ? on_translation :
								     on_translation_unrecorded);
	if (recording) {
#ifdef QVIS_HAVE_CUT_CALLBACK
		qemu_plugin_register_vcpu_tb_cut_cb(plugin_id, on_cut);
#endif
	}
#ifdef QVIS_HAVE_IO_CALLBACK
	qemu_plugin_register_vcpu_io_cb(plugin_id, on_io);
#endif
#ifdef QVIS_HAVE_DISCON_CALLBACK
	qemu_plugin_register_vcpu_discon_cb(plugin_id, QEMU_PLUGIN_DISCON_INTERRUPT, on_interrupt);
#endif
#if !defined(QVIS_HAVE_IO_CALLBACK) || !defined(QVIS_HAVE_DISCON_CALLBACK)
	qemu_plugin_register_vcpu_resume_cb(plugin_id, on_resume);
#endif
}

/* Made here if it is not there yet; one that is there may hold a request already. */
static struct qvis_control *map_control(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	void *mapping = MAP_FAILED;

	if (fd < 0)
		return NULL;
	/* The blocks as well: a full disk is to fail here, not when it is written to. */
	errno = posix_fallocate(fd, 0, sizeof(struct qvis_control));
	if (!errno)
		mapping = mmap(NULL, sizeof(struct qvis_control), PROT_READ | PROT_WRITE,
			       MAP_SHARED, fd, 0);
	close(fd);
	return mapping == MAP_FAILED ? NULL : mapping;
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
					   char **argv)
{
	if (argc != 1 || !g_str_has_prefix(argv[0], "control=")) {
		fprintf(stderr, "tracer: needs control=FILE and nothing else\n");
		return -1;
	}
	if (!info->system_emulation) {
		fprintf(stderr, "tracer: user mode has no devices to trace\n");
		return -1;
	}
	control = map_control(argv[0] + strlen("control="));
	if (!control) {
		fprintf(stderr, "tracer: %s: %s\n", argv[0], strerror(errno));
		return -1;
	}
	plugin_id = id;
	vcpus = qemu_plugin_scoreboard_new(sizeof(struct vcpu));
	instructions = qemu_plugin_scoreboard_u64_in_struct(vcpus, struct vcpu, instructions);
	functions = g_hash_table_new(NULL, NULL);
	entries = g_hash_table_new(g_int64_hash, g_int64_equal);
#ifdef QVIS_HAVE_IO_CALLBACK
	control->sees |= QVIS_SEES_ACCESSES | QVIS_SEES_PORTS;
#endif
#ifdef QVIS_HAVE_DISCON_CALLBACK
	control->sees |= QVIS_SEES_INTERRUPTS;
#endif
	/* A request that was there before we were: record from the first instruction on. */
	if (control->want == QVIS_RECORDING) {
		recording = true;
		begin();
		control->state = QVIS_RECORDING;
		control->answered = control->request;
	}
	register_callbacks();
	control->version = QVIS_VERSION;
	__atomic_store_n(&control->magic, QVIS_MAGIC, __ATOMIC_RELEASE);
	return 0;
}
