/* The other process: opens one file at a time and does to it what it is told, a message a command, a number as answer. */
#include "fsops.h"

#include <signal.h>
#include <stdarg.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

static int channel = -1;

static long long lock(int fd, int command, int type, long start, long length) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(fd, command, &lock);
}

static long long append(int fd, char mark, int records) {
    char record[101];
    memset(record, mark, 100);
    record[100] = '\n';
    for (int i = 0; i < records; i++)
        if (write(fd, record, sizeof record) != sizeof record) return -1;
    return records;
}

static long long act(char *command) {
    static int fd = -1;
    static volatile char *map;
    char path[512];
    long a, b, c;
    char mark;
    if (sscanf(command, "open %ld %511s", &a, path) == 2) {
        if (fd >= 0) close(fd);
        return (fd = open(path, a, 0644)) < 0 ? -1 : 0;
    }
    if (!strcmp(command, "close")) { int old = fd; fd = -1; return close(old); }
    if (sscanf(command, "flock %ld", &a) == 1) return flock(fd, a);
    if (sscanf(command, "posix %ld %ld %ld", &a, &b, &c) == 3) return lock(fd, F_SETLK, a, b, c);
    if (sscanf(command, "ofd %ld %ld %ld", &a, &b, &c) == 3) return lock(fd, F_OFD_SETLK, a, b, c);
    if (sscanf(command, "append %ld %c", &a, &mark) == 2) return append(fd, mark, a);
    if (sscanf(command, "map %ld", &a) == 1) {
        void *at = mmap(NULL, a, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED) return -1;
        map = at;
        return 0;
    }
    if (sscanf(command, "peek %ld", &a) == 1) return (unsigned char)map[a];
    if (sscanf(command, "poke %ld %ld", &a, &b) == 2) { map[a] = b; return 0; }
    if (sscanf(command, "read %ld", &a) == 1) { unsigned char byte; return pread(fd, &byte, 1, a) == 1 ? byte : -1; }
    if (sscanf(command, "write %ld %ld", &a, &b) == 2) { unsigned char byte = b; return pwrite(fd, &byte, 1, a); }
    if (sscanf(command, "unlink %511s", path) == 1) return unlink(path);
    if (!strcmp(command, "size")) { struct stat stat; return fstat(fd, &stat) ? -1 : stat.st_size; }
    errno = ENOSYS;
    return -1;
}

static void serve(int connection) {
    char command[1024];
    ssize_t length;
    while ((length = recv(connection, command, sizeof command - 1, 0)) > 0) {
        command[length] = 0;
        errno = 0;
        long long answer = act(command);
        if (answer < 0) answer = -errno;
        send(connection, &answer, sizeof answer, 0);
    }
}

static struct sockaddr_un address(const char *path) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
    return name;
}

int peer_main(const char *path) {
    struct sockaddr_un name = address(path);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    if (bind(listener, (struct sockaddr *)&name, sizeof name) || listen(listener, 1)) { perror("peer"); return 1; }
    printf("listening\n");
    fflush(stdout);
    for (;;) {
        int connection = accept(listener, NULL, NULL);
        if (connection < 0) return 1;
        if (fork() == 0) { serve(connection); _exit(0); }
        close(connection);
    }
}

void peer_connect(const char *path) {
    if (path) {
        struct sockaddr_un name = address(path);
        channel = socket(AF_UNIX, SOCK_SEQPACKET, 0);
        TRY("peer.connect", connect(channel, (struct sockaddr *)&name, sizeof name));
        return;
    }
    int ends[2];
    TRY("peer.connect", socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends));
    channel = ends[0];
    if (fork() == 0) { close(ends[0]); serve(ends[1]); _exit(0); }
    close(ends[1]);
}

void peer_send(const char *format, ...) {
    char command[1024];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(command, sizeof command, format, arguments);
    va_end(arguments);
    send(channel, command, length, 0);
}

long long peer_answer(void) {
    long long answer;
    return recv(channel, &answer, sizeof answer, 0) == sizeof answer ? answer : -EPIPE;
}

long long peer(const char *format, ...) {
    char command[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(command, sizeof command, format, arguments);
    va_end(arguments);
    peer_send("%s", command);
    return peer_answer();
}
