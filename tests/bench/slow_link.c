/* SPDX-License-Identifier: Apache-2.0
 * slow_link.c: a TCP proxy that is a link of a given delay and rate.
 *
 *   slow_link TARGET_PORT ONE_WAY_MS BYTES_PER_SECOND TALLY
 *
 * Listens on a loopback port, which it prints. Each direction has the rate to itself, shared
 * by all connections in pieces; a piece arrives one delay after its last byte was sent. What
 * is under way does not hold up what follows, as on a wire, and a connection has at most
 * WINDOW bytes under way or waiting for its reader, as with TCP's largest windows. The first
 * bytes of a connection wait one round trip more, in the place of its SYN. Slow start and
 * loss are not imitated.
 *
 * TALLY is a file: the monotonic clock's nanoseconds at the start, then for each slot of
 * 10 ms the bytes that reached the listening side's clients, as uint64 of this machine.
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	PIECE = 64 << 10,
	WINDOW = 16 << 20,           /* 100 ms at 1 Gbit/s are 12.5 MB */
	BURST_NS = 1000000,          /* how far ahead of the rate a sender may get */
	EVENTS = 64,
	BACKLOG = 128,
	SLOT_NS = 10000000,
	SLOTS = 360000               /* an hour */
};

struct piece {
	struct piece *next;
	struct flow *flow;
	int64_t due;
	size_t length, sent;         /* length 0: the sender has hung up */
	uint8_t bytes[PIECE];
};

struct queue {
	struct piece *first, **last;
};

/* One direction of all connections. */
struct wire {
	int64_t free_at;             /* when what was sent so far is on the wire */
	struct queue under_way;      /* in order of their arrival */
	uint64_t *tally;             /* NULL: not counted */
};

/* One direction of one connection. */
struct flow {
	struct wire *wire;
	struct connection *connection;
	int from, to;
	bool readable, writable, ended;
	size_t held;                 /* bytes under way or arrived, not yet taken by the reader */
	struct queue arrived;
	struct flow *next_ready;     /* in the ring of those that have something to read */
	bool listed;
};

struct connection {
	struct flow flows[2];        /* to the target, and back */
	int64_t open_at;             /* nothing is sent before */
	int ended;                   /* flows that have */
	bool gone;                   /* never freed: pieces and events may still name it, and runs are short */
};

static int64_t delay;
static double ns_per_byte;
static struct wire wires[2];
static struct piece *spare;
static struct flow *ready, **ready_last = &ready;
static int poller;
static int64_t started;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void push(struct queue *queue, struct piece *piece)
{
	piece->next = NULL;
	*queue->last = piece;
	queue->last = &piece->next;
}

static struct piece *pop(struct queue *queue)
{
	struct piece *piece = queue->first;

	if (!(queue->first = piece->next))
		queue->last = &queue->first;
	return piece;
}

static struct piece *new_piece(void)
{
	struct piece *piece = spare;

	if (piece)
		spare = piece->next;
	else if (!(piece = malloc(sizeof(*piece))))
		fail("malloc");
	return piece;
}

static void give_back(struct piece *piece)
{
	piece->next = spare;
	spare = piece;
}

static void list_ready(struct flow *flow)
{
	if (flow->listed || !flow->readable || flow->ended || flow->held >= WINDOW)
		return;
	flow->listed = true;
	flow->next_ready = NULL;
	*ready_last = flow;
	ready_last = &flow->next_ready;
}

static struct flow *take_ready(void)
{
	struct flow *flow = ready;

	if (!(ready = flow->next_ready))
		ready_last = &ready;
	flow->listed = false;
	return flow;
}

/* ---- the reader's end ---- */

static void connection_end(struct connection *connection)
{
	if (!connection->gone) {
		connection->gone = true;
		close(connection->flows[0].from);
		close(connection->flows[0].to);
	}
	for (int i = 0; i < 2; i++)
		while (connection->flows[i].arrived.first)
			give_back(pop(&connection->flows[i].arrived));
}

/* Write what has arrived, as far as the reader takes it. */
static void hand_over(struct flow *flow, int64_t at)
{
	while (flow->writable && flow->arrived.first && !flow->connection->gone) {
		struct piece *piece = flow->arrived.first;

		if (!piece->length) {
			shutdown(flow->to, SHUT_WR);
			give_back(pop(&flow->arrived));
			if (++flow->connection->ended == 2)
				connection_end(flow->connection);
			return;
		}
		ssize_t sent = send(flow->to, piece->bytes + piece->sent, piece->length - piece->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (sent < 0 && errno == EAGAIN) {
			flow->writable = false;
			return;
		}
		if (sent < 0) {
			connection_end(flow->connection);
			return;
		}
		piece->sent += (size_t)sent;
		flow->held -= (size_t)sent;
		int64_t slot = (at - started) / SLOT_NS;
		if (flow->wire->tally && slot < SLOTS)
			flow->wire->tally[1 + slot] += (uint64_t)sent;
		if (piece->sent == piece->length)
			give_back(pop(&flow->arrived));
	}
	list_ready(flow);
}

static void arrive(struct wire *wire, int64_t at)
{
	while (wire->under_way.first && wire->under_way.first->due <= at) {
		struct piece *piece = pop(&wire->under_way);
		struct flow *flow = piece->flow;

		if (flow->connection->gone) {
			give_back(piece);
			continue;
		}
		push(&flow->arrived, piece);
		hand_over(flow, at);
	}
}

/* ---- the sender's end ---- */

/* Put one piece of what can be read on the wire. */
static void send_piece(struct flow *flow, int64_t at)
{
	struct piece *piece = new_piece();
	ssize_t got = recv(flow->from, piece->bytes, PIECE, MSG_DONTWAIT);

	if (got < 0 && errno == EAGAIN) {
		flow->readable = false;
		give_back(piece);
		return;
	}
	if (got < 0) {
		give_back(piece);
		connection_end(flow->connection);
		return;
	}
	flow->ended = got == 0;
	struct wire *wire = flow->wire;
	int64_t start = wire->free_at > at ? wire->free_at : at;
	wire->free_at = start + (int64_t)((double)got * ns_per_byte);
	piece->flow = flow;
	piece->length = (size_t)got;
	piece->sent = 0;
	piece->due = wire->free_at + delay;
	flow->held += (size_t)got;
	push(&wire->under_way, piece);
	list_ready(flow);
}

/* One piece of each flow in turns, while its wire is free. Returns when to try again. */
static int64_t send_ready(int64_t at)
{
	int64_t again = INT64_MAX;
	struct flow *waiting = NULL, **waiting_last = &waiting;

	while (ready) {
		struct flow *flow = take_ready();
		int64_t may = flow->wire->free_at - BURST_NS;

		if (flow->connection->gone)
			continue;
		if (may < flow->connection->open_at)
			may = flow->connection->open_at;
		if (may <= at) {
			send_piece(flow, at);
			continue;
		}
		if (may < again)
			again = may;
		flow->listed = true;
		flow->next_ready = NULL;
		*waiting_last = flow;
		waiting_last = &flow->next_ready;
	}
	if (waiting) {
		ready = waiting;
		ready_last = waiting_last;
	}
	return again;
}

/* ---- connections ---- */

static void flow_open(struct connection *connection, int which, int from, int to)
{
	struct flow *flow = &connection->flows[which];
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = flow};

	*flow = (struct flow){.wire = &wires[which], .connection = connection, .from = from, .to = to, .writable = true};
	flow->arrived.last = &flow->arrived.first;
	if (epoll_ctl(poller, EPOLL_CTL_ADD, from, &event))
		fail("epoll_ctl");
}

static void connection_open(int listener, const struct sockaddr_in *target)
{
	int one = 1;
	int client = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct connection *connection = calloc(1, sizeof(*connection));

	if (client < 0 || server < 0 || !connection)
		fail("accept");
	if (connect(server, (const struct sockaddr *)target, sizeof(*target)))
		fail("connect");
	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	connection->open_at = now() + 2 * delay;
	flow_open(connection, 0, client, server);
	flow_open(connection, 1, server, client);
}

static void flow_event(struct flow *flow, uint32_t events, int64_t at)
{
	if (flow->connection->gone)
		return;
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
		flow->readable = true;
		list_ready(flow);
	}
	/* The socket this flow reads from is the one its sister writes to. */
	if (events & EPOLLOUT) {
		struct flow *sister = &flow->connection->flows[flow == &flow->connection->flows[0]];

		sister->writable = true;
		hand_over(sister, at);
	}
}

static void carry(int listener, const struct sockaddr_in *target)
{
	for (;;) {
		struct epoll_event events[EVENTS];
		int64_t at = now();

		for (int i = 0; i < 2; i++)
			arrive(&wires[i], at);
		int64_t wake = send_ready(at);
		for (int i = 0; i < 2; i++)
			if (wires[i].under_way.first && wires[i].under_way.first->due < wake)
				wake = wires[i].under_way.first->due;
		int64_t wait = wake == INT64_MAX ? 1000000000 : wake > at ? wake - at : 0;
		struct timespec timeout = {.tv_sec = wait / 1000000000, .tv_nsec = wait % 1000000000};
		int count = epoll_pwait2(poller, events, EVENTS, &timeout, NULL);
		if (count < 0 && errno != EINTR)
			fail("epoll_pwait2");
		at = now();
		for (int i = 0; i < count; i++) {
			if (events[i].data.ptr)
				flow_event(events[i].data.ptr, events[i].events, at);
			else
				connection_open(listener, target);
		}
	}
}

static uint64_t *tally_open(const char *path)
{
	size_t size = (1 + SLOTS) * sizeof(uint64_t);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	if (fd < 0 || ftruncate(fd, (off_t)size))
		fail(path);
	uint64_t *tally = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (tally == MAP_FAILED)
		fail(path);
	close(fd);
	tally[0] = (uint64_t)(started = now());
	return tally;
}

int main(int words, char **word)
{
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, target = here;
	socklen_t size = sizeof(here);
	struct epoll_event event = {.events = EPOLLIN};

	if (words != 5) {
		fprintf(stderr, "usage: slow_link TARGET_PORT ONE_WAY_MS BYTES_PER_SECOND TALLY\n");
		return 2;
	}
	target.sin_port = htons((uint16_t)atoi(word[1]));
	delay = (int64_t)(atof(word[2]) * 1e6);
	ns_per_byte = 1e9 / atof(word[3]);
	for (int i = 0; i < 2; i++)
		wires[i].under_way.last = &wires[i].under_way.first;
	wires[1].tally = tally_open(word[4]);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	poller = epoll_create1(EPOLL_CLOEXEC);
	if (listener < 0 || poller < 0 || bind(listener, (struct sockaddr *)&here, size) || listen(listener, BACKLOG) ||
	    getsockname(listener, (struct sockaddr *)&here, &size) || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event))
		fail("listening");
	printf("%d\n", ntohs(here.sin_port));
	fflush(stdout);
	carry(listener, &target);
}
