// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A TCG plugin beside qvis's tracer: what a guest and its devices have in RAM.
 *
 *	-plugin file=libshared.so,output=FILE,ram=BYTES
 *
 * Every store of a vCPU, and of its loads from each place the first since a device
 * was last written to, which may find what that device has put there. For a machine
 * with one thread for all its vCPUs (-icount): there is one file, and nothing is
 * locked. A guest stores some fifty million times while Linux boots; what of that a
 * device looks at is for the reader to know.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <glib.h>
#include <qemu/qemu-plugin.h>

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

#define LOAD 0x80
#define WORD 4

/* The interrupt controllers write nothing to RAM. */
#define CONTROLLERS 0xfec00000ull
#define CONTROLLERS_END 0xff000000ull

/* scripts/record_accesses.py has the same layout. */
struct touch {
	uint64_t time; /* ns, CLOCK_MONOTONIC, as the tracer's */
	uint64_t value;
	uint64_t where; /* guest-physical address << 8 | bytes | LOAD */
};

static struct touch buffer[1 << 16];
static size_t used;
static uint64_t ram;
static uint32_t epoch = 1; /* a device that is written to begins a new one */
static uint32_t *loaded; /* by WORD of RAM: the epoch in which it was last loaded */
static int output;
static bool failed;

static void flush(void)
{
	const char *from = (const char *)buffer;
	size_t left = used * sizeof(buffer[0]);

	used = 0;
	while (left && !failed) {
		ssize_t done = write(output, from, left);

		if (done < 0 && errno != EINTR) {
			fprintf(stderr, "shared: %s\n", strerror(errno));
			failed = true; /* and the file too short for its reader */
		} else if (done > 0) {
			from += done;
			left -= done;
		}
	}
}

static bool is_first(uint64_t address, unsigned int size)
{
	bool first = false;

	for (uint64_t at = address / WORD; at <= (address + size - 1) / WORD; at++) {
		first |= loaded[at] != epoch;
		if (size >= WORD) /* else there is more in the word */
			loaded[at] = epoch;
	}
	return first;
}

static void keep(uint64_t address, unsigned int size, uint64_t value, bool load)
{
	struct timespec now;

	if (address + size > ram || (load && !is_first(address, size)))
		return;
	clock_gettime(CLOCK_MONOTONIC, &now);
	buffer[used++] = (struct touch){
		.time = now.tv_sec * 1000000000ull + now.tv_nsec,
		.value = value,
		.where = address << 8 | size | (load ? LOAD : 0),
	};
	if (used == G_N_ELEMENTS(buffer))
		flush();
}

static void on_access(unsigned int index, qemu_plugin_meminfo_t info, uint64_t address,
		      void *unused)
{
	struct qemu_plugin_hwaddr *where = qemu_plugin_get_hwaddr(info, address);
	uint64_t physical = where ? qemu_plugin_hwaddr_phys_addr(where) : UINT64_MAX;
	unsigned int size = 1u << qemu_plugin_mem_size_shift(info);
	bool load = !qemu_plugin_mem_is_store(info);
	qemu_plugin_mem_value value;

	if (physical >= ram)
		return;
	value = qemu_plugin_mem_get_value(info);
	switch (value.type) {
	case QEMU_PLUGIN_MEM_VALUE_U8:
		keep(physical, size, value.data.u8, load);
		break;
	case QEMU_PLUGIN_MEM_VALUE_U16:
		keep(physical, size, value.data.u16, load);
		break;
	case QEMU_PLUGIN_MEM_VALUE_U32:
		keep(physical, size, value.data.u32, load);
		break;
	case QEMU_PLUGIN_MEM_VALUE_U64:
		keep(physical, size, value.data.u64, load);
		break;
	case QEMU_PLUGIN_MEM_VALUE_U128:
		keep(physical, 8, value.data.u128.low, load);
		keep(physical + 8, 8, value.data.u128.high, load);
		break;
	}
}

static void on_io(qemu_plugin_id_t id, unsigned int index, enum qemu_plugin_io_space space,
		  uint64_t address, unsigned int size, bool is_store, uint64_t value)
{
	bool controller = address >= CONTROLLERS && address < CONTROLLERS_END;

	if (space == QEMU_PLUGIN_IO_MEMORY && is_store && !controller)
		epoch++;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t nr = qemu_plugin_tb_n_insns(tb);

	for (size_t i = 0; i < nr; i++)
		qemu_plugin_register_vcpu_mem_cb(qemu_plugin_tb_get_insn(tb, i), on_access,
						 QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, NULL);
}

static void on_exit_of_qemu(qemu_plugin_id_t id, void *unused)
{
	flush();
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
					   char **argv)
{
	if (argc != 2 || !g_str_has_prefix(argv[0], "output=") ||
	    !g_str_has_prefix(argv[1], "ram=")) {
		fprintf(stderr, "shared: needs output=FILE,ram=BYTES\n");
		return -1;
	}
	ram = g_ascii_strtoull(argv[1] + strlen("ram="), NULL, 0);
	loaded = calloc(ram / WORD, sizeof(loaded[0]));
	output = open(argv[0] + strlen("output="), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
	if (output < 0 || !loaded) {
		fprintf(stderr, "shared: %s: %s\n", argv[0], strerror(errno));
		return -1;
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
	qemu_plugin_register_vcpu_io_cb(id, on_io);
	qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
	return 0;
}
