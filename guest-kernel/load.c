// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qvis-load: make one virtio-blk queue complete a known number of requests.
 *
 *	qvis-load DEVICE CPU COUNT
 *
 * Pins itself to CPU and reads COUNT sectors of DEVICE, one at a time, past the
 * page cache. blk-mq sends a request through the queue that the submitting CPU
 * maps to, and with one request in flight the device interrupts once for each:
 * COUNT completions are COUNT interrupts of that queue's vector.
 *
 * DEVICE may be any other file that is made anew each time that it is read, such
 * as /sys/block/vda/serial, for which virtio-blk sends a request too.
 *
 * Prints one JSON object. Exit status: 0 done, 1 an I/O failed, 2 bad usage.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

/* Covers the logical block size of any virtio-blk device (512 or 4096). */
#define BLOCK 4096

static void die(int status, const char *what, const char *which)
{
	fprintf(stderr, "qvis-load: %s %s: %s\n", what, which, strerror(errno));
	exit(status);
}

static long number(const char *text, const char *name)
{
	char *end;
	long value;

	errno = 0;
	value = strtol(text, &end, 10);
	if (errno || end == text || *end || value < 0) {
		fprintf(stderr, "qvis-load: %s must be a number, not '%s'\n",
			name, text);
		exit(2);
	}
	return value;
}

static void pin(long cpu, const char *text)
{
	cpu_set_t *set = CPU_ALLOC(cpu + 1);
	size_t size = CPU_ALLOC_SIZE(cpu + 1);

	if (!set)
		die(2, "cannot allocate a mask for CPU", text);
	CPU_ZERO_S(size, set);
	CPU_SET_S(cpu, size, set);
	if (sched_setaffinity(0, size, set))
		die(2, "cannot run on CPU", text);
	CPU_FREE(set);
}

int main(int argc, char **argv)
{
	struct timespec start, end;
	struct stat status;
	unsigned long long size;
	long cpu, count, i;
	void *buffer;
	int disk, fd;

	if (argc != 4) {
		fprintf(stderr, "usage: qvis-load DEVICE CPU COUNT\n");
		return 2;
	}
	cpu = number(argv[2], "CPU");
	count = number(argv[3], "COUNT");
	pin(cpu, argv[2]);

	if (stat(argv[1], &status))
		die(2, "cannot open", argv[1]);
	disk = S_ISBLK(status.st_mode);
	fd = open(argv[1], disk ? O_RDONLY | O_DIRECT : O_RDONLY);
	if (fd < 0)
		die(2, "cannot open", argv[1]);
	size = BLOCK;
	if (disk && (ioctl(fd, BLKGETSIZE64, &size) || size < BLOCK))
		die(2, "no room for a block on", argv[1]);
	if (posix_memalign(&buffer, BLOCK, BLOCK))
		die(2, "cannot allocate a buffer for", argv[1]);

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (i = 0; i < count; i++) {
		off_t at = (off_t)(i % (size / BLOCK)) * BLOCK;

		ssize_t length = pread(fd, buffer, BLOCK, at);

		if (length < 0 || (disk && length != BLOCK))
			die(1, "cannot read", argv[1]);
	}
	clock_gettime(CLOCK_MONOTONIC, &end);

	printf("{\"device\": \"%s\", \"cpu\": %ld, \"completed\": %ld, \"guest_ns\": %lld}\n",
	       argv[1], cpu, i,
	       (end.tv_sec - start.tv_sec) * 1000000000LL +
	       (end.tv_nsec - start.tv_nsec));
	return 0;
}
