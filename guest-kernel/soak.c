// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qvis-soak: load every virtio-blk queue while its interrupt is masked, unmasked
 * and moved at random, and account for every single interrupt.
 *
 *	qvis-soak FOLDER SEED INTERRUPTS RESETS DEADLINE [lose|misdirect]
 *
 * Each queue has a loader, pinned to the CPU that submits to that queue, which
 * reads one block at a time. Each disk has a meddler, which masks, unmasks and
 * moves the vectors of the disk. The main thread watches, resets disks (unbind
 * and bind of the driver) and writes FOLDER/progress about twice a second; a line
 * of JSON, which says "ended" when it is the last one.
 *
 * FOLDER/hold, made by somebody else, has each meddler mask one vector and keep it
 * so, with an interrupt that is due, until the file is gone; "held" counts them.
 * The program ends after INTERRUPTS interrupts and RESETS resets, but not before
 * FOLDER/enough is there, or as soon as an interrupt is lost.
 *
 * What is checked. With one request in flight a queue's device interrupts once a
 * request, and nobody but the handler of that interrupt ends the request. So
 *
 * - an interrupt is lost when a request does not end although its vector is not
 *   masked. DEADLINE is in seconds during which this guest ran.
 *
 * - an interrupt is on a wrong CPU if it is counted on one which the vector had no
 *   business with between the start of its request and the end. A loader reads the
 *   vector's count on each CPU before and after each request. If no move was under
 *   way in between, there is exactly one CPU it may be counted on.
 *
 * - a mask leaks if a request begins and ends while the vector is masked.
 *
 * When has a move returned? When the write to smp_affinity has, if the interrupt
 * can be moved at once. For MSI-X over PCI x86 Linux waits for the next interrupt,
 * which still comes to the old CPU (one is allowed), and so it does for any chip
 * when the vector that the last move gave up is still to be released (at a timer
 * tick). The meddler looks at that before most moves ("settled"): from those
 * nothing but the one interrupt over PCI is excused. Some moves ("hasty") are made
 * regardless; then interrupts may come to the old CPU until effective_affinity
 * has changed.
 *
 * What is allowed beyond one interrupt a request:
 *
 * - none: the handler of the last interrupt was still at work, and found the
 *   request without being told ("coalesced"). It may be told nevertheless, later.
 *
 * - over PCI, a second one ("spurious"): a move may retrigger the interrupt or hit
 *   another one's vector. It may still be on the way to the old CPU, or to one that
 *   has masked it, when the first is long handled. If its handler is at work there
 *   when the next request's own interrupt comes elsewhere, Linux has it do the work
 *   of both and counts one ("merged"). Excused for that is only a CPU that a move
 *   during an earlier request left, and that took nothing then: not one which goes
 *   on as before.
 *
 * lose and misdirect plant a fault, to show that it is found: a vector stays masked
 * of which the checker does not know, or moves are told to the checker only.
 *
 * Exit status: 0 nothing wrong, 1 something is, 2 bad usage or no such guest.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

#define BLOCK 4096
#define MAX_DISKS 4
#define MAX_QUEUES 16	/* of a disk */
#define MAX_CPUS 64	/* bits in a set */
#define RING 64		/* moves of a vector that are remembered */
#define TEXT 8192

#define TICK_NS (200 * 1000000LL)	/* of the watch */
#define GHOST_NS (1000 * 1000000LL)	/* a message that a busy vCPU has not taken yet */
#define NEVER_NS (2000 * 1000000LL)	/* a deferred move which has not happened */
#define NEVER_INTERRUPTS 100

#define DRIVER "/sys/bus/virtio/drivers/virtio_blk"

typedef _Atomic uint64_t counter;

struct vector {
	struct disk *disk;
	int queue, irq;
	int cpu;	/* that submits to the queue */
	int counts_fd, affinity_fd, effective_fd, chip_fd, lock_fd;

	/*
	 * Written by the meddler. Move n goes to target[n % RING]; it has begun
	 * before the write to smp_affinity, has returned after it, and is done when
	 * no later request's interrupt may come to the CPU of move n - 1.
	 */
	_Atomic unsigned int begun, returned, done;
	_Atomic unsigned char target[RING];
	_Atomic bool settled[RING];
	_Atomic unsigned int mask_gen;	/* odd: masked since it got this value */
	long long unmask_at;		/* 0: never, it is held */
	long long moved_at;
	uint64_t moved_interrupts;
	bool own_mask;			/* it is masked, whatever mask_gen says */
	unsigned long settling;		/* this request gets no help by another unmask */

	/* written by the loader */
	_Atomic unsigned long request;	/* the one in flight, 0 if there is none */
	_Atomic unsigned int paused;	/* the pause that it keeps */
	counter requests, interrupts, coalesced, spurious, late, in_flight;
	counter exact, merged, begun_masked, old_allowed, wrong, leaks, unexplained;
	_Atomic unsigned int leaked;	/* under the current mask, not yet judged */
	unsigned long base[MAX_CPUS];	/* counts at the beginning of the epoch */
	counter epoch_interrupts;

	/* the watch's */
	unsigned long seen_request;
	int stuck;
	unsigned int seen_gen;
};

struct disk {
	char device[32];	/* virtio0 */
	char name[32];		/* vda */
	int nqueues;
	struct vector vectors[MAX_QUEUES];
	_Atomic unsigned int pause;	/* the number of the pause to keep, or 0 */
	_Atomic unsigned int meddler_paused;
	unsigned int pauses;		/* so far */
	_Atomic uint64_t beats;
	_Atomic int held;	/* irq of a vector held masked with an interrupt due */
	uint64_t state;		/* of the meddler's random numbers */
	uint64_t reset_at;	/* interrupts of the disk */
	unsigned long config_base;
};

static struct disk disks[MAX_DISKS];
static int ndisks, ncpus;
static const char *folder, *plant = "";
static char chip[64];
static bool deferring;	/* moves happen with the next interrupt */
static bool move_doubles;	/* a move may make a second interrupt of one */
static _Atomic bool hold, stop;
static _Atomic bool planted;

static counter masks, unmasks, moves, settled_moves, masked_moves, refused_moves;
static counter busy_masks, busy_unmasks, forgiven_leaks, never_moved;
static uint64_t resets, config_interrupts, miscounts;

static pthread_mutex_t note_lock = PTHREAD_MUTEX_INITIALIZER;
static char notes[TEXT];

static void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fprintf(stderr, "qvis-soak: ");
	vfprintf(stderr, format, arguments);
	fprintf(stderr, ": %s\n", strerror(errno));
	va_end(arguments);
	exit(2);
}

/* What went wrong first, one line each, as long as there is room. */
static void note(const char *format, ...)
{
	va_list arguments;
	size_t used;

	pthread_mutex_lock(&note_lock);
	used = strlen(notes);
	va_start(arguments, format);
	if (used < sizeof(notes) / 2)
		vsnprintf(notes + used, sizeof(notes) / 2, format, arguments);
	va_end(arguments);
	pthread_mutex_unlock(&note_lock);
}

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void pause_ns(long long ns)
{
	struct timespec t = { ns / 1000000000, ns % 1000000000 };

	nanosleep(&t, NULL);
}

/* xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators") */
static uint64_t draw(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1dULL;
}

static unsigned int below(uint64_t *state, unsigned int limit)
{
	return (draw(state) >> 33) % limit;
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("cannot run on CPU %d", cpu);
}

static int open_file(int flags, const char *format, ...)
{
	char path[256];
	va_list arguments;
	int fd;

	va_start(arguments, format);
	vsnprintf(path, sizeof(path), format, arguments);
	va_end(arguments);
	fd = open(path, flags | O_CLOEXEC);
	if (fd < 0)
		die("cannot open %s", path);
	return fd;
}

/* In one go: asked for the rest, the kernel would make the whole text again. */
static ssize_t read_text(int fd, char *text, size_t size)
{
	ssize_t length = pread(fd, text, size - 1, 0);

	text[length < 0 ? 0 : length] = 0;
	return length;
}

static long read_number(int fd)
{
	char text[64];

	if (read_text(fd, text, sizeof(text)) <= 0)
		die("cannot read a number of an interrupt");
	return strtol(text, NULL, 10);
}

static void read_counts(struct vector *v, unsigned long *counts)
{
	char text[512], *at = text;
	int cpu;

	if (read_text(v->counts_fd, text, sizeof(text)) <= 0)
		die("cannot read the counts of irq %d", v->irq);
	for (cpu = 0; cpu < ncpus; cpu++, at++)
		counts[cpu] = strtoul(at, &at, 10);
}

/* The CPUs that an interrupt may come to from move "from" to move "to". */
static uint64_t targets(struct vector *v, unsigned int from, unsigned int to)
{
	uint64_t set = 0;

	if (to - from >= RING)
		return ~0ULL;
	for (; from != to + 1; from++)
		set |= 1ULL << v->target[from % RING];
	return set;
}

/* The loader */

struct window {		/* what is known of a vector across requests */
	unsigned long counts[MAX_CPUS];
	unsigned long number;
	/*
	 * Until when one more may arrive (0: none is expected), and the window that it
	 * dates from. A device fires for a request after all messages of the one before
	 * are sent, so one which the CPU has not taken by then waits in its local APIC,
	 * and goes with whatever comes to that CPU next.
	 */
	long long ghost[MAX_CPUS];
	unsigned long born[MAX_CPUS];
	long long stray[MAX_CPUS];	/* likewise, at a CPU that a move passed by */
	bool owed;	/* one, by a request that ended without */
	unsigned int late_move, late;	/* interrupts at the old CPU after that move */
};

static bool take(long long *until, long long now)
{
	bool there = *until > now;

	*until = 0;
	return there;
}

static void judge(struct vector *v, struct window *w, unsigned int done, unsigned int returned,
		  unsigned int gen)
{
	unsigned long counts[MAX_CPUS], total = 0, own = 0, outside = 0, extra;
	unsigned int begun, gen_after;
	uint64_t allowed, strict, took = 0;
	long long now;
	bool moved, twice, merged = false, ghosts = false;
	int cpu;

	/* In this order: each is at least as late as what it is held against. */
	read_counts(v, counts);
	begun = v->begun;
	gen_after = v->mask_gen;
	now = now_ns();

	moved = begun != done;
	twice = moved && move_doubles;
	w->number++;
	allowed = targets(v, done, begun);
	strict = targets(v, returned, begun);
	for (cpu = 0; cpu < ncpus; cpu++) {
		unsigned long delta = counts[cpu] - w->counts[cpu];

		w->counts[cpu] = counts[cpu];
		ghosts |= w->ghost[cpu] > now || w->stray[cpu] > now;
		total += delta;
		took |= (uint64_t)!!delta << cpu;
		if (allowed >> cpu & 1)
			own += delta;
		else
			outside += delta;
		if (!delta)
			continue;
		if (allowed >> cpu & 1 && !(strict >> cpu & 1)) {
			/* The change has returned, but the kernel has put it off. */
			v->old_allowed += delta;
			if (w->late_move != returned) {
				w->late_move = returned;
				w->late = 0;
			}
			w->late += delta;
			if (v->settled[returned % RING] && w->late > 1) {
				v->wrong += delta;
				note("%s-req.%d irq %d: %u interrupts on CPU %d after a move away "
				     "from it returned\n", v->disk->device, v->queue, v->irq, w->late,
				     cpu);
			}
		}
	}
	v->interrupts += total;
	v->epoch_interrupts += total;
	v->requests++;
	if (!(allowed & (allowed - 1)))
		v->exact += total;

	for (cpu = 0; outside && cpu < ncpus; cpu++) {
		/* What came to a CPU it should not; "counts" are in w by now. */
		if (allowed >> cpu & 1)
			continue;
		if (!(took >> cpu & 1))
			continue;
		if (!own && take(&w->stray[cpu], now)) {
			v->merged++;
			outside--;
			own = 1;
			merged = true;
		} else if (own && (take(&w->stray[cpu], now) | take(&w->ghost[cpu], now))) {
			v->in_flight++;
			v->spurious++;
			outside--;
		}
	}
	if (outside) {
		v->wrong += outside;
		note("%s-req.%d irq %d: %lu interrupts on a CPU other than %d (set %#llx), counts now "
		     "%lu %lu %lu %lu\n", v->disk->device, v->queue, v->irq, outside,
		     v->target[begun % RING], (unsigned long long)allowed, counts[0], counts[1],
		     counts[2], counts[3]);
		own = own ? own : 1;	/* this was it */
	}
	for (extra = own > 1 ? own - 1 : 0; extra; extra--) {
		bool told = false;

		for (cpu = 0; cpu < ncpus && !told; cpu++)
			told = allowed >> cpu & 1 && take(&w->ghost[cpu], now);
		if (told && w->owed) {
			v->late++;
			w->owed = false;
		} else if (told || twice) {
			v->spurious++;
		} else {
			v->unexplained++;
			note("%s-req.%d irq %d: one more interrupt than requests\n",
			     v->disk->device, v->queue, v->irq);
		}
	}
	if (!own)
		v->coalesced++;
	if (!own || merged)
		w->owed = true;
	/* Who may still get an interrupt that no request waits for. */
	for (cpu = 0; cpu < ncpus; cpu++) {
		if (took >> cpu & 1 && w->number >= w->born[cpu] + 2)
			w->ghost[cpu] = w->stray[cpu] = 0;
		if (allowed >> cpu & 1 && (!own || twice || merged)) {
			w->ghost[cpu] = now + GHOST_NS;
			w->born[cpu] = w->number;
			if (moved && move_doubles && !(took >> cpu & 1))
				w->stray[cpu] = now + GHOST_NS;
		}
	}
	if (gen & 1 && !ghosts && !moved) {
		v->begun_masked++;
		if (gen_after == gen && total)
			v->leaked++;
	}
}

static void *load(void *argument)
{
	struct vector *v = argument;
	struct window w;
	unsigned long long size;
	unsigned long number = 0;
	void *buffer;
	int fd = -1;

	pin(v->cpu);
	if (posix_memalign(&buffer, BLOCK, BLOCK))
		die("no memory");
	for (;;) {
		unsigned int done, returned, gen, pause = v->disk->pause;

		if (stop)
			return NULL;
		if (pause) {
			if (fd >= 0)
				close(fd);
			fd = -1;
			v->paused = pause;
			pause_ns(1000000);
			continue;
		}
		if (fd < 0) {
			fd = open_file(O_RDONLY | O_DIRECT, "/dev/%s", v->disk->name);
			if (ioctl(fd, BLKGETSIZE64, &size) || size < BLOCK)
				die("no room for a block on %s", v->disk->name);
			memset(&w, 0, sizeof(w));
			memcpy(w.counts, v->base, sizeof(w.counts));
		}
		/* Newest last: "returned" never runs ahead of "begun" read afterwards. */
		done = v->done;
		returned = v->returned;
		gen = v->mask_gen;
		v->request = ++number;
		if (pread(fd, buffer, BLOCK, (off_t)(number % (size / BLOCK)) * BLOCK) != BLOCK)
			die("cannot read %s", v->disk->name);
		v->request = 0;
		judge(v, &w, done, returned, gen);
	}
}

/* The meddler */

static bool write_text(int fd, const char *text)
{
	return write(fd, text, strlen(text)) == (ssize_t)strlen(text);
}

static bool mask(struct vector *v)
{
	/*
	 * What an unmask has lost, the next one would find, and nobody would know. So
	 * after some of them the request in flight has to end by itself.
	 */
	if (v->settling && v->settling == v->request)
		return false;
	v->settling = 0;
	if (!write_text(v->chip_fd, "mask")) {
		if (errno != EBUSY)
			die("cannot mask irq %d", v->irq);
		busy_masks++;	/* the kernel has it masked for a moment */
		return false;
	}
	v->own_mask = true;
	masks++;
	if (!strcmp(plant, "lose") && masks > 50 && !atomic_exchange(&planted, true))
		return false;	/* and nobody knows */
	v->mask_gen++;
	return true;
}

static void unmask(struct vector *v)
{
	unsigned int leaked;
	bool busy = false;

	v->mask_gen++;
	if (!write_text(v->chip_fd, "unmask")) {
		if (errno != EBUSY)
			die("cannot unmask irq %d", v->irq);
		busy = true;	/* a handler has, since another interrupt had come meanwhile */
		busy_unmasks++;
	} else {
		unmasks++;
	}
	v->own_mask = false;
	v->settling = below(&v->disk->state, 4) ? 0 : v->request;
	leaked = atomic_exchange(&v->leaked, 0);
	if (busy)
		forgiven_leaks += leaked;
	else if (leaked) {
		v->leaks += leaked;
		note("%s-req.%d irq %d: %u interrupts while masked\n", v->disk->device, v->queue,
		     v->irq, leaked);
	}
}

/* Whether the vector of the last move's old CPU is released: then nothing puts off a move. */
static bool can_settle(struct vector *v)
{
	char text[TEXT];

	return read_text(v->chip_fd, text, sizeof(text)) > 0 &&
	       strstr(text, "move_in_progress: 0") && strstr(text, "cleanup_pending:  0");
}

/* Whether the kernel has made the last move, to the end. */
static bool arrived(struct vector *v)
{
	if (read_number(v->effective_fd) != v->target[v->begun % RING])
		return false;
	/*
	 * Set before the message is written, by a handler with the descriptor locked.
	 * Reading this takes the same lock.
	 */
	read_number(v->lock_fd);
	return true;
}

static void move(struct vector *v, int cpu, bool settle)
{
	unsigned int next = v->begun + 1;
	char text[32];

	snprintf(text, sizeof(text), "%llx\n", 1ULL << cpu);
	v->target[next % RING] = cpu;
	v->settled[next % RING] = settle;
	v->begun = next;
	if (!strcmp(plant, "misdirect") && settle && !deferring && moves > 50 &&
	    v->target[(next - 1) % RING] != cpu) {
		v->returned = v->done = next;
		return;
	}
	if (!write_text(v->affinity_fd, text)) {
		/* Nothing was done. What is left is a move to where it was. */
		refused_moves++;
		v->target[next % RING] = v->target[(next - 1) % RING];
	} else {
		moves++;
		settled_moves += settle;
		masked_moves += v->own_mask;
	}
	v->returned = next;
	v->moved_at = now_ns();
	v->moved_interrupts = v->interrupts;
	if ((settle && !deferring) || arrived(v))
		v->done = next;
}

static void settle_moves(struct disk *d, long long now)
{
	int i;

	for (i = 0; i < d->nqueues; i++) {
		struct vector *v = &d->vectors[i];

		if (v->done == v->begun)
			continue;
		if (arrived(v)) {
			if (!strcmp(plant, "misdirect") && moves > 50) {
				/* The next one of PCI's, which never arrive at once. */
				v->target[(v->begun + 1) % RING] =
					(v->target[v->begun % RING] + 1) % ncpus;
				v->begun++;
				v->returned++;
			}
			v->done = v->begun;
		} else if (now - v->moved_at > NEVER_NS &&
			   v->interrupts - v->moved_interrupts > NEVER_INTERRUPTS) {
			never_moved++;
			note("%s-req.%d irq %d: never moved to CPU %d\n", d->device, v->queue,
			     v->irq, v->target[v->begun % RING]);
			v->moved_at = now;
		}
	}
}

/* Keep one vector masked with an interrupt that is due; NULL when there is none yet. */
static struct vector *hold_one(struct disk *d, struct vector *held, unsigned long *request)
{
	if (!held) {
		struct vector *v = &d->vectors[below(&d->state, d->nqueues)];

		if (v->own_mask || !mask(v))
			return NULL;
		v->unmask_at = 0;
		*request = 0;
		return v;
	}
	/* The same request over a while: its interrupt is what it waits for. */
	if (!d->held) {
		unsigned long current = held->request;

		if (current && current == *request)
			d->held = held->irq;
		else
			pause_ns(20000000);
		*request = current;
	}
	return held;
}

static void *meddle(void *argument)
{
	struct disk *d = argument;
	struct vector *held = NULL;
	unsigned long held_request = 0;
	int i;

	for (;;) {
		uint64_t *state = &d->state;
		long long now = now_ns();
		struct vector *v;
		unsigned int what, pause = d->pause;

		d->beats++;
		if (pause || stop) {
			held = NULL;
			d->held = 0;
			for (i = 0; i < d->nqueues; i++) {
				v = &d->vectors[i];
				if (v->mask_gen & 1)
					unmask(v);
			}
			d->meddler_paused = pause;
			if (stop)
				return NULL;
			pause_ns(1000000);
			continue;
		}
		if (hold) {
			held = hold_one(d, held, &held_request);
		} else if (held) {
			unmask(held);
			held = NULL;
			d->held = 0;
		}
		for (i = 0; i < d->nqueues; i++) {
			v = &d->vectors[i];
			if (v != held && v->mask_gen & 1 && now >= v->unmask_at)
				unmask(v);
		}
		settle_moves(d, now);

		v = &d->vectors[below(state, d->nqueues)];
		what = below(state, 16);
		if (what < 8) {
			/* To any CPU; where it is already counts as well. */
			int cpu = below(state, ncpus);
			bool hasty = below(state, 8) == 0;
			bool settle = v->done == v->begun && can_settle(v);

			if (settle || (hasty && v->done == v->begun))
				move(v, cpu, settle);
		} else if (v->mask_gen & 1) {
			if (v != held && what < 12)
				unmask(v);
		} else if (what < 14) {
			if (mask(v))
				v->unmask_at = now + below(state, 16 << below(state, 9)) * 1000LL;
		} else {
			/* Close together, so that the device meets the edges. */
			for (i = below(state, 8); i >= 0; i--) {
				if (mask(v))
					unmask(v);
			}
		}
		if (below(state, 32) == 0)
			pin(below(state, ncpus));
		if (below(state, 4) == 0)
			pause_ns(below(state, 500000));
	}
}

/* Disks and their vectors */

/* Interrupts of one vector by CPU, or of the configuration, from /proc/interrupts. */
static bool find_irq(const char *text, const char *action, int *irq, unsigned long *counts)
{
	const char *line, *end;

	for (line = text; *line; line = *end ? end + 1 : end) {
		const char *name;
		char *at;
		int cpu;

		end = strchrnul(line, '\n');
		for (name = end; name > line && !isspace((unsigned char)name[-1]); name--)
			;
		if ((size_t)(end - name) != strlen(action) || strncmp(name, action, end - name))
			continue;
		*irq = strtol(line, &at, 10);
		at++;
		for (cpu = 0; cpu < ncpus; cpu++)
			counts[cpu] = strtoul(at, &at, 10);
		while (isspace((unsigned char)*at))
			at++;
		snprintf(chip, sizeof(chip), "%.*s", (int)strcspn(at, " "), at);
		return true;
	}
	return false;
}

static void read_interrupts(char *text, size_t size)
{
	int fd = open_file(O_RDONLY, "/proc/interrupts");
	size_t used = 0;
	ssize_t length;

	while ((length = read(fd, text + used, size - 1 - used)) > 0)
		used += length;
	if (length < 0 || !used)
		die("cannot read /proc/interrupts");
	text[used] = 0;
	close(fd);
}

static unsigned long sum(const unsigned long *counts)
{
	unsigned long total = 0;
	int cpu;

	for (cpu = 0; cpu < ncpus; cpu++)
		total += counts[cpu];
	return total;
}

static bool only_entry(const char *path, char *name, size_t size)
{
	struct dirent *entry;
	DIR *dir = opendir(path);
	bool found = false;

	while (dir && (entry = readdir(dir))) {
		if (entry->d_name[0] == '.')
			continue;
		found = strlen(entry->d_name) < size;
		if (found)
			strcpy(name, entry->d_name);
	}
	if (dir)
		closedir(dir);
	return found;
}

/* Find what the driver made of a disk, and begin an epoch: all counts anew. */
static void set_up(struct disk *d)
{
	char path[300], action[64], text[TEXT * 4];
	unsigned long counts[MAX_CPUS];
	int q, irq, fd;

	snprintf(path, sizeof(path), "/sys/bus/virtio/devices/%s/block", d->device);
	if (!only_entry(path, d->name, sizeof(d->name)))
		die("%s has no disk", d->device);
	read_interrupts(text, sizeof(text));
	snprintf(action, sizeof(action), "%s-config", d->device);
	if (!find_irq(text, action, &irq, counts))
		die("no vector %s", action);
	d->config_base = sum(counts);
	for (q = 0;; q++) {
		struct vector *v = &d->vectors[q];
		int cpu;

		snprintf(action, sizeof(action), "%s-req.%d", d->device, q);
		if (!find_irq(text, action, &irq, counts))
			break;
		if (q == MAX_QUEUES)
			die("too many queues on %s", d->device);
		v->disk = d;
		v->queue = q;
		v->irq = irq;
		memcpy(v->base, counts, sizeof(v->base));
		v->epoch_interrupts = 0;
		fd = open_file(O_RDONLY, "/sys/block/%s/mq/%d/cpu_list", d->name, q);
		cpu = read_number(fd);
		close(fd);
		if (d->nqueues && cpu != v->cpu)
			die("queue %d of %s has another CPU after a reset", q, d->device);
		v->cpu = cpu;
		v->counts_fd = open_file(O_RDONLY, "/sys/kernel/irq/%d/per_cpu_count", irq);
		v->lock_fd = open_file(O_RDONLY, "/sys/kernel/irq/%d/hwirq", irq);
		v->affinity_fd = open_file(O_RDWR, "/proc/irq/%d/smp_affinity", irq);
		v->effective_fd = open_file(O_RDONLY, "/proc/irq/%d/effective_affinity_list", irq);
		v->chip_fd = open_file(O_RDWR, "/sys/kernel/debug/irq/irqs/%d", irq);
		v->begun = v->returned = v->done = 0;
		v->target[0] = read_number(v->effective_fd);
		v->mask_gen = 0;
	}
	if (!q || (d->nqueues && q != d->nqueues))
		die("%s has %d vectors of queues, not one each", d->device, q);
	d->nqueues = q;
}

static void put_away(struct disk *d)
{
	int q;

	for (q = 0; q < d->nqueues; q++) {
		struct vector *v = &d->vectors[q];

		close(v->counts_fd);
		close(v->lock_fd);
		close(v->affinity_fd);
		close(v->effective_fd);
		close(v->chip_fd);
	}
}

/*
 * Everything of the epoch is over: do the sums of the loaders agree with the table
 * that everybody else reads? An interrupt that came after the last request makes a
 * difference of one at most, and only where one may come late.
 */
static void audit(struct disk *d)
{
	unsigned long counts[MAX_CPUS];
	char action[64], text[TEXT * 4];
	int q, irq;

	read_interrupts(text, sizeof(text));
	snprintf(action, sizeof(action), "%s-config", d->device);
	if (!find_irq(text, action, &irq, counts))
		die("no vector %s", action);
	config_interrupts += sum(counts) - d->config_base;
	for (q = 0; q < d->nqueues; q++) {
		struct vector *v = &d->vectors[q];
		unsigned long taken, judged = v->epoch_interrupts;

		snprintf(action, sizeof(action), "%s-req.%d", d->device, q);
		if (!find_irq(text, action, &irq, counts) || irq != v->irq)
			die("no vector %s", action);
		taken = sum(counts) - sum(v->base);
		if (taken != judged && taken != judged + 1) {
			miscounts++;
			note("%s irq %d: %lu interrupts, of which loaders saw %lu\n", action, irq,
			     taken, judged);
		}
	}
}

static void write_driver(const char *what, const char *device)
{
	int fd = open_file(O_WRONLY, DRIVER "/%s", what);

	if (!write_text(fd, device))
		die("cannot %s %s", what, device);
	close(fd);
}

static void reset(struct disk *d)
{
	char text[TEXT * 4];

	audit(d);
	put_away(d);
	write_driver("unbind", d->device);
	read_interrupts(text, sizeof(text));
	if (strstr(text, d->device)) {
		miscounts++;
		note("%s has interrupts without a driver\n", d->device);
	}
	write_driver("bind", d->device);
	set_up(d);
	resets++;
}

/* Telling the world */

static void put_string(FILE *out, const char *text)
{
	fputc('"', out);
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			fputc('\\', out);
		if (*text == '\n')
			fputs("\\n", out);
		else if ((unsigned char)*text >= 32)
			fputc(*text, out);
		else
			fputc(' ', out);
	}
	fputc('"', out);
}

struct total {
	uint64_t requests, interrupts, exact, merged, begun_masked, coalesced, spurious, late, in_flight,
		old_allowed, wrong, leaks, unexplained;
};

static struct total add_up(void)
{
	struct total t = { 0 };
	int i, q;

	for (i = 0; i < ndisks; i++) {
		for (q = 0; q < disks[i].nqueues; q++) {
			struct vector *v = &disks[i].vectors[q];

			t.requests += v->requests;
			t.interrupts += v->interrupts;
			t.exact += v->exact;
			t.merged += v->merged;
			t.begun_masked += v->begun_masked;
			t.coalesced += v->coalesced;
			t.spurious += v->spurious;
			t.late += v->late;
			t.in_flight += v->in_flight;
			t.old_allowed += v->old_allowed;
			t.wrong += v->wrong;
			t.leaks += v->leaks;
			t.unexplained += v->unexplained;
		}
	}
	return t;
}

static void put_lost(FILE *out, struct vector *v)
{
	unsigned long counts[MAX_CPUS];
	char text[TEXT * 4];
	int cpu;

	read_counts(v, counts);
	fprintf(out, "{\"device\": \"%s\", \"queue\": %d, \"irq\": %d, \"request\": %lu, "
		"\"target\": %d, \"masked_by_meddler\": %s, \"counts\": [", v->disk->device,
		v->queue, v->irq, (unsigned long)v->request, v->target[v->begun % RING],
		v->own_mask ? "true" : "false");
	for (cpu = 0; cpu < ncpus; cpu++)
		fprintf(out, "%s%lu", cpu ? ", " : "", counts[cpu]);
	read_text(v->chip_fd, text, sizeof(text));
	fprintf(out, "], \"state\": ");
	put_string(out, text);
	read_interrupts(text, sizeof(text));
	fprintf(out, ", \"interrupts\": ");
	put_string(out, text);
	fprintf(out, "}");
}

static uint64_t report(bool ended, uint64_t lost, struct vector **who, const char *stuck)
{
	struct total t = add_up();
	char draft[300], final[300];
	uint64_t bad = lost + t.wrong + t.leaks + t.unexplained + never_moved + miscounts;
	int i, q, held = 0;
	FILE *out;

	snprintf(draft, sizeof(draft), "%s/.progress", folder);
	snprintf(final, sizeof(final), "%s/progress", folder);
	out = fopen(draft, "w");
	if (!out)
		die("cannot write %s", draft);
	for (i = 0; i < ndisks; i++)
		held += disks[i].held != 0;
#define PUT(name, value) fprintf(out, "\"%s\": %llu, ", name, (unsigned long long)(value))
	fprintf(out, "{\"ended\": %s, \"stuck\": ", ended ? "true" : "false");
	if (stuck)
		put_string(out, stuck);
	else
		fprintf(out, "null");
	fprintf(out, ", \"chip\": ");
	put_string(out, chip);
	fprintf(out, ", ");
	PUT("held", held);
	PUT("requests", t.requests);
	PUT("interrupts", t.interrupts);
	PUT("with_one_cpu_allowed", t.exact);
	PUT("begun_while_masked", t.begun_masked);
	PUT("masks", masks);
	PUT("unmasks", unmasks);
	PUT("moves", moves);
	PUT("settled_moves", settled_moves);
	PUT("moves_while_masked", masked_moves);
	PUT("refused_moves", refused_moves);
	PUT("resets", resets);
	PUT("lost", lost);
	PUT("wrong_cpu", t.wrong);
	PUT("never_moved", never_moved);
	PUT("while_masked", t.leaks);
	PUT("unexplained", t.unexplained);
	PUT("miscounted_epochs", miscounts);
	PUT("spurious", t.spurious);
	PUT("spurious_on_old_cpu", t.in_flight);
	PUT("merged_on_old_cpu", t.merged);
	PUT("coalesced", t.coalesced);
	PUT("coalesced_told_late", t.late);
	PUT("old_cpu_until_kernel_moved", t.old_allowed);
	PUT("config_interrupts", config_interrupts);
	PUT("mask_found_masked", busy_masks);
	PUT("unmask_found_unmasked", busy_unmasks);
	PUT("forgiven_while_masked", forgiven_leaks);
	fprintf(out, "\"bad\": %llu, \"queues\": {", (unsigned long long)bad);
	for (i = 0; i < ndisks; i++) {
		for (q = 0; q < disks[i].nqueues; q++) {
			struct vector *v = &disks[i].vectors[q];

			fprintf(out, "%s\"%s-req.%d\": [%llu, %llu]", i || q ? ", " : "",
				disks[i].device, q, (unsigned long long)v->requests,
				(unsigned long long)v->interrupts);
		}
	}
	fprintf(out, "}, \"lost_vectors\": [");
	for (i = 0; i < (int)lost; i++) {
		fprintf(out, "%s", i ? ", " : "");
		put_lost(out, who[i]);
	}
	pthread_mutex_lock(&note_lock);
	fprintf(out, "], \"notes\": ");
	put_string(out, notes);
	pthread_mutex_unlock(&note_lock);
	fprintf(out, "}\n");
	if (fclose(out) || rename(draft, final))
		die("cannot write %s", final);
	return bad;
}

/* The watch */

static bool is_there(const char *name)
{
	char path[300];

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	return !access(path, F_OK);
}

/*
 * Requests which have been in flight for so many looks with their vector not masked.
 * Looks, not time: a host that has stopped this guest for a while has lost nothing.
 */
static int find_lost(struct vector **who, int looks)
{
	int i, q, lost = 0;

	for (i = 0; i < ndisks; i++) {
		for (q = 0; q < disks[i].nqueues; q++) {
			struct vector *v = &disks[i].vectors[q];
			unsigned long request = v->request;
			unsigned int gen = v->mask_gen;

			if (!request || request != v->seen_request || gen & 1) {
				v->stuck = 0;
				v->seen_request = request;
			} else if (++v->stuck >= looks) {
				who[lost++] = v;
			}
		}
	}
	return lost;
}

static void begin_pause(struct disk *d)
{
	if (!d->pause)
		d->pause = ++d->pauses;
}

/* No loader waits: every request so far has ended. Then a disk may be reset. */
static bool is_idle(struct disk *d)
{
	int q;

	if (d->meddler_paused != d->pause)
		return false;
	for (q = 0; q < d->nqueues; q++) {
		if (d->vectors[q].paused != d->pause)
			return false;
	}
	return true;
}

static uint64_t disk_interrupts(struct disk *d)
{
	uint64_t total = 0;
	int q;

	for (q = 0; q < d->nqueues; q++)
		total += d->vectors[q].interrupts;
	return total;
}

static void next_reset(struct disk *d, uint64_t mean, uint64_t *state)
{
	d->reset_at = disk_interrupts(d) + mean / 2 + draw(state) % (mean + 1);
}

static int soak(uint64_t wanted, uint64_t wanted_resets, int looks, uint64_t seed)
{
	uint64_t state = seed, beats[MAX_DISKS] = { 0 };
	uint64_t mean = wanted / (wanted_resets + 1) + 1;
	struct vector *who[MAX_DISKS * MAX_QUEUES];
	int dead[MAX_DISKS] = { 0 };
	long long looked = 0, told = 0;
	const char *stuck = NULL;
	bool finish = false;
	int i, lost = 0;

	for (i = 0; i < ndisks; i++)
		next_reset(&disks[i], mean, &state);
	for (;;) {
		long long now = now_ns();
		struct total t = add_up();
		bool idle = true;

		hold = is_there("hold");
		/* A planted fault has to have been met, or to be missed for long. */
		if (!finish && t.interrupts >= wanted && resets >= wanted_resets &&
		    (!*plant || t.wrong || t.interrupts >= 20 * wanted) &&
		    !hold && is_there("enough")) {
			finish = true;
			for (i = 0; i < ndisks; i++)
				begin_pause(&disks[i]);
		}
		for (i = 0; i < ndisks; i++) {
			struct disk *d = &disks[i];

			if (!finish && !hold && disk_interrupts(d) >= d->reset_at)
				begin_pause(d);
			if (!d->pause)
				continue;
			if (!is_idle(d)) {
				idle = false;
			} else if (!finish) {
				reset(d);
				next_reset(d, mean, &state);
				d->pause = 0;
			}
		}
		if (finish && idle)
			break;
		if (now - looked >= TICK_NS) {
			looked = now;
			lost = find_lost(who, looks);
			for (i = 0; i < ndisks; i++) {
				dead[i] = disks[i].beats == beats[i] ? dead[i] + 1 : 0;
				beats[i] = disks[i].beats;
				if (dead[i] >= looks)
					stuck = disks[i].device;
			}
			if (lost || stuck)
				break;
		}
		if (now - told >= 2 * TICK_NS) {
			told = now;
			report(false, 0, who, NULL);
		}
		pause_ns(2000000);
	}
	if (!lost && !stuck) {
		for (i = 0; i < ndisks; i++)
			audit(&disks[i]);
		stop = true;
	}
	return report(true, lost, who, stuck) || stuck;
}

static void find_disks(void)
{
	struct dirent **entries;
	int count = scandir(DRIVER, &entries, NULL, alphasort), i;

	for (i = 0; i < count; i++) {
		struct disk *d = &disks[ndisks];

		if (strncmp(entries[i]->d_name, "virtio", 6))
			continue;
		if (ndisks == MAX_DISKS)
			die("too many disks");
		ndisks++;
		snprintf(d->device, sizeof(d->device), "%.31s", entries[i]->d_name);
	}
	if (!ndisks)
		die("no disk of virtio_blk");
}

static uint64_t number(const char *text)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(text, &end, 0);
	if (errno || end == text || *end) {
		fprintf(stderr, "qvis-soak: not a number: '%s'\n", text);
		exit(2);
	}
	return value;
}

int main(int argc, char **argv)
{
	uint64_t seed, wanted, wanted_resets;
	pthread_t thread;
	int i, q, looks, failed;

	if (argc != 6 && argc != 7) {
		fprintf(stderr, "usage: qvis-soak FOLDER SEED INTERRUPTS RESETS DEADLINE "
				"[lose|misdirect]\n");
		return 2;
	}
	folder = argv[1];
	/* Never zero, which xorshift stays at, and unlike for seeds that are alike. */
	seed = number(argv[2]) * 0x9e3779b97f4a7c15ULL + 0x1234567;
	seed = seed ? seed : 1;
	wanted = number(argv[3]);
	wanted_resets = number(argv[4]);
	looks = number(argv[5]) * 1000000000LL / TICK_NS;
	if (argc == 7)
		plant = argv[6];
	ncpus = sysconf(_SC_NPROCESSORS_ONLN);
	if (ncpus > MAX_CPUS)
		die("too many CPUs");

	find_disks();
	for (i = 0; i < ndisks; i++) {
		disks[i].state = draw(&seed) | 1;
		set_up(&disks[i]);
	}
	deferring = strstr(chip, "PCI") != NULL;
	move_doubles = deferring;
	for (i = 0; i < ndisks; i++) {
		if (pthread_create(&thread, NULL, meddle, &disks[i]))
			die("cannot start a thread");
		for (q = 0; q < disks[i].nqueues; q++) {
			if (pthread_create(&thread, NULL, load, &disks[i].vectors[q]))
				die("cannot start a thread");
		}
	}
	failed = soak(wanted, wanted_resets, looks ? looks : 1, draw(&seed)) != 0;
	/* A loader may wait for ever: nobody waits for the loaders. */
	_exit(failed);
}
