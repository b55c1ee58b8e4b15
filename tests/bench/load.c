// What a container does to be measured; each subcommand prints `name value unit` lines. Static, for any image.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MIB = 1 << 20 };
static char buffer[MIB];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void tell(const char *name, double amount, double since) { printf("%s=%.3f\n", name, amount / (now() - since)); }

static int opened(const char *path, int flags)
{
    int fd = open(path, flags, 0644);
    if (fd < 0) err(1, "%s", path);
    return fd;
}

// Reads a file in pieces of 1 MiB: MB/s.
static void sequential(const char *name, const char *path)
{
    int fd = opened(path, O_RDONLY);
    double start = now(), bytes = 0;
    for (ssize_t n; (n = read(fd, buffer, MIB)); bytes += n)
        if (n < 0) err(1, "read");
    tell(name, bytes / 1e6, start);
    close(fd);
}

// Files `read` and `random` of the folder were not read here before, `write` is made, and so are `count` small files; as many are in `made`.
static void files(const char *folder, int count)
{
    char path[4096];
    double start;
    if (chdir(folder)) err(1, "%s", folder);
    sequential("sequential read, cold", "read");
    sequential("sequential read, warm", "read");

    int fd = opened("random", O_RDONLY);
    long pages = lseek(fd, 0, SEEK_END) / 4096;
    start = now();
    srandom(1);
    for (int i = 0; i < 1000; i++)
        if (pread(fd, buffer, 4096, random() % pages * 4096) != 4096) err(1, "pread");
    tell("random read, cold", 1000, start);
    close(fd);

    fd = opened("write", O_WRONLY | O_CREAT | O_EXCL);
    start = now();
    for (int i = 0; i < 32; i++)
        if (write(fd, buffer, MIB) != MIB) err(1, "write");
    if (fsync(fd)) err(1, "fsync");
    tell("sequential write", 32 * MIB / 1e6, start);
    close(fd);

    start = now();
    for (int i = 0; i < count; i++) {
        sprintf(path, "small-%d", i);
        fd = opened(path, O_WRONLY | O_CREAT | O_EXCL);
        if (write(fd, buffer, 10) != 10) err(1, "write");
        close(fd);
    }
    tell("small files: create", count, start);
    struct stat status;
    for (int warm = 0; warm < 2; warm++) {
        start = now();
        for (int i = 0; i < count; i++) {
            sprintf(path, "made/%d", i);
            if (stat(path, &status)) err(1, "%s", path);
        }
        tell(warm ? "small files: stat, warm" : "small files: stat, cold", count, start);
    }
    for (int warm = 0; warm < 2; warm++) {
        start = now();
        for (int i = 0; i < count; i++) {
            sprintf(path, "made/%d", i);
            fd = opened(path, O_RDONLY);
            if (read(fd, buffer, 4096) != 10) err(1, "read");
            close(fd);
        }
        tell(warm ? "small files: read, warm" : "small files: read, cold", count, start);
    }
    start = now();
    for (int i = 0; i < count; i++) {
        sprintf(path, "small-%d", i);
        if (unlink(path)) err(1, "unlink");
    }
    tell("small files: unlink", count, start);
}

// A header of 8 bytes says how much comes and how much is wanted back, each in bytes.
struct header { uint32_t in, out; };

static void whole(int fd, void *data, size_t length, int writes)
{
    for (char *at = data; length;) {
        ssize_t n = writes ? write(fd, at, length) : read(fd, at, length);
        if (n <= 0) err(1, writes ? "write" : "read");
        at += n, length -= n;
    }
}

static void pour(int fd, size_t bytes, int writes)
{
    for (; bytes; bytes -= bytes < MIB ? bytes : MIB) whole(fd, buffer, bytes < MIB ? bytes : MIB, writes);
}

static void serve(const char *address)
{
    int one = 1, server = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(7000)};
    inet_pton(AF_INET, address, &at.sin_addr);
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(server, (void *)&at, sizeof at) || listen(server, 8)) err(1, "listen");
    puts("ready");
    fflush(stdout);
    for (int fd; (fd = accept(server, 0, 0)) >= 0; close(fd)) {
        struct header h;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        while (recv(fd, &h, sizeof h, MSG_WAITALL) == sizeof h) {
            pour(fd, h.in, 0);
            pour(fd, h.out, 1);
        }
    }
}

static void request(int fd, uint32_t out, uint32_t in)
{
    struct header h = {out, in};
    whole(fd, &h, sizeof h, 1);
    pour(fd, out, 1);
    pour(fd, in, 0);
}

static void net(const char *address)
{
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(7000)};
    inet_pton(AF_INET, address, &at.sin_addr);
    if (connect(fd, (void *)&at, sizeof at)) err(1, "connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    request(fd, 1, 1);
    double start = now();
    request(fd, 64 * MIB, 1);
    tell("net: pod to host", 64 * MIB / 1e6, start);
    start = now();
    request(fd, 1, 64 * MIB);
    tell("net: host to pod", 64 * MIB / 1e6, start);
    start = now();
    for (int i = 0; i < 300; i++) request(fd, 0, 1);
    tell("net: request and response", 300, start);
}

// Fills memory and ends, which frees it.
static void touch(size_t mib)
{
    char *memory = mmap(0, mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) err(1, "mmap");
    memset(memory, 1, mib * MIB);
    puts("filled");
    fflush(stdout);
    getchar();
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "files")) files(argv[2], atoi(argv[3]));
    else if (argc == 3 && !strcmp(argv[1], "serve")) serve(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "net")) net(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "touch")) touch(atoi(argv[2]));
    else errx(2, "files FOLDER COUNT, serve ADDRESS, net ADDRESS, touch MIB");
    return 0;
}
