// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qvis-record: record KVM's tracepoints in the host of a nested machine.
 *
 *	qvis-record PORT [EVENT...]
 *
 * Serves the virtio-serial port called PORT, in the background from when it is
 * ready. With EVENTs (of tracefs's kvm group) it records them from then on, and
 * holds what it recorded in the kernel's buffers until somebody asks for it.
 *
 * What comes in are lines:
 *
 *	start TOKEN EVENT...	begin, and send what is recorded as it comes
 *	stop TOKEN		end, and send what there is still
 *
 * What goes out are frames, "NAME LENGTH\n" and LENGTH bytes:
 *
 *	@TOKEN			the answer to the line with this TOKEN begins
 *	events/..., per_cpu/...	a file of tracefs
 *	cpu<N>.raw		another page of that CPU's buffer
 *	pair			CLOCK_MONOTONIC's ns and the TSC of one moment
 *	started, ended		the answer to start, or stop, is complete
 *	error			why it failed, in words
 *
 * Nobody but the one QEMU uses KVM here, so all of KVM's events are of it: no
 * filter, and what kworkers deliver for it is there too. Nothing is parsed or
 * printed in this machine, where all that runs is emulated.
 *
 * Exit status: 0 it serves, 1 it cannot, 2 bad usage.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define PORTS "/sys/class/virtio-ports"
#define TRACEFS "/sys/kernel/tracing/"
#define INSTANCE TRACEFS "instances/qvis/"
#define BUFFERS_KB (48 << 10)	/* of all CPUs: some 300,000 exits */
#define INTERVAL_MS 50		/* between two looks at the buffers */
#define CPUS 64
#define EVENTS 32
#define PAGE 4096		/* the page that tracefs hands out: see begin() */
#define TRIES 5			/* to read two clocks at the same moment */

static char out[1 << 16];
static size_t held;		/* bytes in out */
static char line[4096];
static size_t got;		/* bytes in line */
static int port;
static bool connected;		/* somebody is there, as far as we know */
static bool gone;		/* and is not any more */

static int pipes[CPUS], cpus;
static char *events[EVENTS];
static int event_count;
static bool recording, streaming;
static char first[64];		/* the two clocks when the recording began */
static char fault[256];		/* why the last thing failed */

static bool fail(const char *format, ...)
{
	va_list words;

	va_start(words, format);
	vsnprintf(fault, sizeof(fault), format, words);
	va_end(words);
	return false;
}

/* Sending */

static void flush(void)
{
	struct pollfd wait = { .fd = port, .events = POLLOUT };
	size_t done = 0;

	while (done < held && !gone) {
		ssize_t n = write(port, out + done, held - done);

		if (n > 0) {
			done += n;
		} else if (n < 0 && errno != EAGAIN && errno != EINTR) {
			gone = true;
		} else {
			poll(&wait, 1, -1);
			gone = wait.revents & (POLLHUP | POLLERR);
		}
	}
	held = 0;
}

static void put(const void *data, size_t size)
{
	const char *from = data;

	while (size) {
		size_t part = sizeof(out) - held;

		if (part > size)
			part = size;
		memcpy(out + held, from, part);
		held += part;
		from += part;
		size -= part;
		if (held == sizeof(out))
			flush();
	}
}

static void frame(const char *name, const void *data, size_t size)
{
	char head[128];

	put(head, snprintf(head, sizeof(head), "%s %zu\n", name, size));
	put(data, size);
}

static void send_file(const char *root, const char *name)
{
	static char text[1 << 16];
	char path[256];
	size_t size = 0;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "%s%s", root, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;		/* then it is missing outside, where that is said */
	while (size < sizeof(text) &&
	       (n = read(fd, text + size, sizeof(text) - size)) > 0)
		size += n;
	close(fd);
	frame(name, text, size);
}

/* Recording */

static bool set(const char *name, const char *value)
{
	char path[256];
	bool done;
	int fd;

	snprintf(path, sizeof(path), INSTANCE "%s", name);
	fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
	done = fd >= 0 && write(fd, value, strlen(value)) > 0;
	if (!done)
		fail("cannot write %s to %s: %s", value, path, strerror(errno));
	if (fd >= 0)
		close(fd);
	return done;
}

/* Write down both clocks: of a few tries the one that took the shortest. */
static void clocks(char text[64])
{
	unsigned long long before, after, best = ~0ULL, ns = 0, tsc = 0;
	struct timespec now;
	int i;

	for (i = 0; i < TRIES; i++) {
		before = __rdtsc();
		clock_gettime(CLOCK_MONOTONIC, &now);
		after = __rdtsc();
		if (after - before < best) {
			best = after - before;
			tsc = before + best / 2;
			ns = now.tv_sec * 1000000000ULL + now.tv_nsec;
		}
	}
	snprintf(text, 64, "%llu %llu", ns, tsc);
}

static void send_clocks(void)
{
	char text[64];

	clocks(text);
	frame("pair", text, strlen(text));
}

static void end(void)
{
	int tries;

	while (cpus)
		close(pipes[--cpus]);
	/* The kernel may take a moment to let go of an instance. */
	for (tries = 0; rmdir(INSTANCE) && errno == EBUSY && tries < 100; tries++)
		usleep(20000);
	recording = streaming = false;
}

static bool open_pipes(void)
{
	char path[256];

	for (cpus = 0; cpus < CPUS; cpus++) {
		snprintf(path, sizeof(path),
			 INSTANCE "per_cpu/cpu%d/trace_pipe_raw", cpus);
		pipes[cpus] = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
		if (pipes[cpus] < 0 && errno == ENOENT && cpus)
			return true;
		if (pipes[cpus] < 0)
			return fail("cannot open %s: %s", path, strerror(errno));
	}
	return fail("more than %d CPUs", CPUS - 1);
}

static bool begin(void)
{
	char text[64], path[256];
	int i;

	end();			/* what one that was killed has left */
	/* Readers take the page's size from header_page; ours must hold it. */
	if (sysconf(_SC_PAGESIZE) != PAGE)
		return fail("pages of %ld bytes", sysconf(_SC_PAGESIZE));
	if (mkdir(INSTANCE, 0700))
		return fail("cannot make %s: %s", INSTANCE, strerror(errno));
	if (!set("tracing_on", "0") || !set("trace_clock", "x86-tsc") ||
	    !set("options/overwrite", "1") || !open_pipes())
		return false;
	snprintf(text, sizeof(text), "%d", BUFFERS_KB / cpus);
	if (!set("buffer_size_kb", text))
		return false;
	for (i = 0; i < event_count; i++) {
		snprintf(path, sizeof(path), INSTANCE "events/kvm/%s",
			 events[i]);
		if (access(path, F_OK))
			continue;	/* kernels differ: the reader knows */
		snprintf(path, sizeof(path), "events/kvm/%s/enable", events[i]);
		if (!set(path, "1"))
			return false;
	}
	clocks(first);
	recording = set("tracing_on", "1");
	return recording;
}

/*
 * Send the pages of a CPU: the full ones and the one being filled, or all. Pages
 * that are not full yet can be read too, but each is a whole page outside.
 */
static bool drain(int cpu, bool all)
{
	bool some = false;
	static char page[PAGE];
	char name[32];

	snprintf(name, sizeof(name), "cpu%d.raw", cpu);
	while (!gone) {
		ssize_t n = read(pipes[cpu], page, sizeof(page));
		unsigned int used;

		if (n <= 0)
			break;
		some = true;
		frame(name, page, n);
		/* Behind the time stamp: how much is used, in the low bits. */
		memcpy(&used, page + 8, sizeof(used));
		if ((used & 0xfffff) < PAGE / 2 && !all)
			break;
	}
	return some;
}

/* What the reader needs beside the pages, and when they began. */
static void send_formats(void)
{
	char name[128];
	int i;

	frame("pair", first, strlen(first));

	send_file(TRACEFS, "events/header_page");
	send_file(TRACEFS, "events/header_event");
	for (i = 0; i < event_count; i++) {
		snprintf(name, sizeof(name), "events/kvm/%s/format", events[i]);
		send_file(TRACEFS, name);
	}
}

static void start(void)
{
	if (recording)
		fail("a recording goes on");
	else if (begin())
		streaming = true;
	else
		end();
	if (!streaming) {
		frame("error", fault, strlen(fault));
		return;
	}
	send_formats();
	frame("started", "", 0);
}

static void stop(void)
{
	char name[64];
	int cpu;

	if (!recording) {
		fail("there is no recording");
		frame("error", fault, strlen(fault));
		return;
	}
	set("tracing_on", "0");
	if (!streaming)
		send_formats();
	for (cpu = 0; cpu < cpus; cpu++) {
		drain(cpu, true);
		snprintf(name, sizeof(name), "per_cpu/cpu%d/stats", cpu);
		send_file(INSTANCE, name);
	}
	send_clocks();
	frame("ended", "", 0);
	end();
}

/* Being told */

static void keep_events(char **names, int count)
{
	int i;

	while (event_count)
		free(events[--event_count]);
	for (i = 0; i < count && i < EVENTS; i++)
		events[event_count++] = strdup(names[i]);
}

static void obey(char *text)
{
	char *words[EVENTS + 2], head[128], *rest;
	int count = 0;

	for (rest = text; count < EVENTS + 2; count++)
		if (!(words[count] = strtok_r(rest, " ", &rest)))
			break;
	if (count < 2)
		return;
	snprintf(head, sizeof(head), "@%.64s", words[1]);
	frame(head, "", 0);
	if (!strcmp(words[0], "start")) {
		if (!recording)
			keep_events(words + 2, count - 2);
		start();
	} else if (!strcmp(words[0], "stop")) {
		stop();
	} else {
		fail("no such command: %.64s", words[0]);
		frame("error", fault, strlen(fault));
	}
	flush();
}

static void listen_to(void)
{
	ssize_t n = read(port, line + got, sizeof(line) - 1 - got);
	char *end_of_line;

	if (n <= 0)
		return;
	got += n;
	line[got] = '\0';
	while ((end_of_line = strchr(line, '\n'))) {
		*end_of_line++ = '\0';
		obey(line);
		got -= end_of_line - line;
		memmove(line, end_of_line, got + 1);
	}
	if (got == sizeof(line) - 1)
		got = 0;	/* nobody says so much */
}

/*
 * Wait for somebody outside, without ever waking up in vain. What one says may
 * be here before the news that it has come: only what is left of one who went is
 * thrown away.
 */
static void await(void)
{
	sigset_t changes;

	if (connected) {
		if (streaming)
			end();
		while (read(port, line, sizeof(line)) > 0)
			;
		got = 0;
		connected = gone = false;
	}
	sigemptyset(&changes);
	sigaddset(&changes, SIGIO);
	sigwaitinfo(&changes, NULL);
}

static void serve(void)
{
	struct pollfd wait = { .fd = port, .events = POLLIN };
	bool some;
	int cpu;

	for (;;) {
		poll(&wait, 1, streaming ? INTERVAL_MS : -1);
		if (gone || wait.revents & POLLHUP) {
			await();
			continue;
		}
		connected = true;
		if (wait.revents & POLLIN)
			listen_to();
		some = false;
		for (cpu = 0; streaming && cpu < cpus; cpu++)
			some |= drain(cpu, false);
		if (some)
			send_clocks();	/* if it dies, this was the last */
		flush();
	}
}

/* Ports are in /dev by number; sysfs tells their names. */
static int open_port(const char *wanted)
{
	char path[512], name[128];
	struct dirent *entry;
	DIR *ports = opendir(PORTS);
	int found = -1;

	while (ports && found < 0 && (entry = readdir(ports))) {
		ssize_t n;
		int fd;

		snprintf(path, sizeof(path), PORTS "/%s/name", entry->d_name);
		fd = open(path, O_RDONLY);
		if (fd < 0)
			continue;
		n = read(fd, name, sizeof(name) - 1);
		close(fd);
		name[n > 0 ? n : 0] = '\0';
		name[strcspn(name, "\n")] = '\0';
		if (strcmp(name, wanted))
			continue;
		snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
		found = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	}
	if (ports)
		closedir(ports);
	return found;
}

int main(int argc, char **argv)
{
	sigset_t changes;

	if (argc < 2 || argc - 2 > EVENTS) {
		fprintf(stderr, "usage: qvis-record PORT [EVENT...]\n");
		return 2;
	}
	port = open_port(argv[1]);
	if (port < 0) {
		fprintf(stderr, "qvis-record: no port %s: %s\n", argv[1],
			strerror(errno));
		return 1;
	}
	keep_events(argv + 2, argc - 2);
	if (event_count && !begin()) {
		fprintf(stderr, "qvis-record: %s\n", fault);
		end();
		return 1;
	}
	if (daemon(0, 0))
		return 1;
	/* The port signals when somebody comes or goes, or says something. */
	sigemptyset(&changes);
	sigaddset(&changes, SIGIO);
	sigprocmask(SIG_BLOCK, &changes, NULL);
	if (fcntl(port, F_SETOWN, getpid()) ||
	    fcntl(port, F_SETFL, O_NONBLOCK | O_ASYNC))
		return 1;
	serve();
}
