/* The least an NBD server can do: the bound that no server goes beyond with the same client and socket.
 *
 *     pump SOCKET SIZE_BYTES [SPIN_MICROSECONDS]
 *
 * It has no file and no map. One receive takes in all requests that are waiting, a READ is answered with one page of
 * zeros sent again and again, the payload of a WRITE is received and dropped, one sendmsg carries all replies of a
 * batch. What remains are the system calls, the copies through the socket, and the client. SPIN: for how long it
 * polls before it sleeps in a receive; 0 sleeps at once.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER_BYTES = 1 << 20, BATCH = 256, LARGEST_BYTES = 64 << 20 };
static uint64_t size_bytes;
static long spin_ns;
static char *zeros;

struct link {
    int socket, structured;
    size_t pos, have;
    char *buffer;
};

static long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* At least one byte into the buffer; 0 at the end of the stream. */
static int receive(struct link *c) {
    if (c->pos) {
        memmove(c->buffer, c->buffer + c->pos, c->have - c->pos);
        c->have -= c->pos;
        c->pos = 0;
    }
    if (spin_ns) {
        struct pollfd p = {.fd = c->socket, .events = POLLIN};
        long end = now_ns() + spin_ns;
        while (!poll(&p, 1, 0) && now_ns() < end) {
        }
    }
    ssize_t n = recv(c->socket, c->buffer + c->have, BUFFER_BYTES - c->have, 0);
    if (n > 0) c->have += (size_t)n;
    return n > 0;
}

static char *need(struct link *c, size_t count) {
    while (c->have - c->pos < count)
        if (!receive(c)) return NULL;
    c->pos += count;
    return c->buffer + c->pos - count;
}

static int send_all(int fd, struct iovec *v, int n) {
    while (n) {
        struct msghdr m = {.msg_iov = v, .msg_iovlen = (size_t)n};
        ssize_t sent = sendmsg(fd, &m, MSG_NOSIGNAL);
        if (sent < 0) return -1;
        while (n && (size_t)sent >= v->iov_len) {
            sent -= (ssize_t)v->iov_len;
            v++, n--;
        }
        if (n) {
            v->iov_base = (char *)v->iov_base + sent;
            v->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

static void put(char **p, uint64_t value, int bytes) {
    while (bytes--) *(*p)++ = (char)(value >> (8 * bytes));
}

static uint64_t get(const char *p, int bytes) {
    uint64_t value = 0;
    while (bytes--) value = value << 8 | (unsigned char)*p++;
    return value;
}

static int answer(struct link *c, uint32_t option, uint32_t kind, const char *body, uint32_t count) {
    char out[64], *p = out;
    put(&p, 0x3e889045565a9, 8), put(&p, option, 4), put(&p, kind, 4), put(&p, count, 4);
    memcpy(p, body, count);
    struct iovec v = {out, 20 + count};
    return send_all(c->socket, &v, 1);
}

static int handshake(struct link *c) {
    char out[18], *p = out, *in;
    put(&p, 0x4e42444d41474943, 8), put(&p, 0x49484156454f5054, 8), put(&p, 3, 2);
    struct iovec v = {out, sizeof out};
    if (send_all(c->socket, &v, 1) || !need(c, 4)) return -1;
    for (;;) {
        if (!(in = need(c, 16))) return -1;
        uint32_t option = (uint32_t)get(in + 8, 4), length = (uint32_t)get(in + 12, 4);
        if (length > 8192 || !need(c, length)) return -1;
        char body[12], *b = body;
        if (option == 8) { /* STRUCTURED_REPLY */
            c->structured = 1;
            if (answer(c, option, 1, "", 0)) return -1;
        } else if (option == 6 || option == 7) { /* INFO, GO */
            put(&b, 0, 2), put(&b, size_bytes, 8), put(&b, 1 | 4 | 256, 2);
            if (answer(c, option, 3, body, 12) || answer(c, option, 1, "", 0)) return -1;
            if (option == 7) return 0;
        } else if (option == 2) { /* ABORT */
            answer(c, option, 1, "", 0);
            return -1;
        } else if (answer(c, option, 0x80000001, "", 0)) {
            return -1;
        }
    }
}

static void transmission(struct link *c) {
    static const uint32_t request = 0x25609513, simple = 0x67446698, chunk = 0x668e33ef;
    struct iovec v[2 * BATCH];
    char heads[BATCH][28];
    size_t payload = 0; /* still to be dropped */
    uint64_t cookie = 0;
    for (;;) {
        int n = 0, replies = 0;
        while (replies < BATCH) {
            if (payload) {
                size_t there = c->have - c->pos, take = there < payload ? there : payload;
                c->pos += take, payload -= take;
                if (payload) break;
                char *p = heads[replies];
                put(&p, simple, 4), put(&p, 0, 4), put(&p, cookie, 8);
                v[n++] = (struct iovec){heads[replies++], 16};
                continue;
            }
            if (c->have - c->pos < 28) break;
            char *in = c->buffer + c->pos;
            if (get(in, 4) != request) return;
            uint32_t command = (uint32_t)get(in + 6, 2), length = (uint32_t)get(in + 24, 4);
            cookie = get(in + 8, 8);
            if (command == 2 || length > LARGEST_BYTES) return;
            c->pos += 28;
            if (command == 1) {
                payload = length;
                continue;
            }
            char *p = heads[replies];
            if (command == 0 && c->structured)
                put(&p, chunk, 4), put(&p, 1, 2), put(&p, 1, 2), put(&p, cookie, 8), put(&p, length + 8, 4),
                    put(&p, get(in + 16, 8), 8);
            else
                put(&p, simple, 4), put(&p, 0, 4), put(&p, cookie, 8);
            v[n++] = (struct iovec){heads[replies], (size_t)(p - heads[replies])};
            replies++;
            if (command == 0) v[n++] = (struct iovec){zeros, length};
        }
        if (n && send_all(c->socket, v, n)) return;
        if (replies < BATCH && !receive(c)) return;
    }
}

static void *serve(void *argument) {
    struct link c = {.socket = (int)(intptr_t)argument, .buffer = malloc(BUFFER_BYTES)};
    if (c.buffer && !handshake(&c)) transmission(&c);
    close(c.socket);
    free(c.buffer);
    return NULL;
}

int main(int count, char **arguments) {
    if (count < 3) return 2;
    size_bytes = strtoull(arguments[2], NULL, 10);
    spin_ns = count > 3 ? atol(arguments[3]) * 1000 : 0;
    zeros = calloc(1, LARGEST_BYTES);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, arguments[1], sizeof address.sun_path - 1);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), wanted = 2 << 20;
    if (!zeros || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) {
        perror(arguments[1]);
        return 1;
    }
    for (;;) {
        int s = accept(listener, NULL, NULL);
        if (s < 0) continue;
        setsockopt(s, SOL_SOCKET, SO_SNDBUF, &wanted, sizeof wanted);
        setsockopt(s, SOL_SOCKET, SO_RCVBUF, &wanted, sizeof wanted);
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)s)) close(s);
        else pthread_detach(thread);
    }
}
