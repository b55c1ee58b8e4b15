/* Mapped files: coherent with read and write, and between two processes (two containers, with a peer in another). */
#include "fsops.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#define PAGE 4096

static sigjmp_buf beyond;

static void bus(int number) {
    (void)number;
    siglongjmp(beyond, 1);
}

void mapped(void) {
    char path[4096], text[8] = "";
    int fd = file("map", "");
    ftruncate(fd, 2 * PAGE);
    char *map = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    HOLDS("mmap.shared", map != MAP_FAILED);
    if (map == MAP_FAILED) return;
    memcpy(map, "mapped", 6);
    NUMBER("mmap.read-sees-it", pread(fd, text, 6, 0));
    HOLDS("mmap.read-same", !strncmp(text, "mapped", 6));
    pwrite(fd, "WRITE", 5, 100);
    HOLDS("mmap.sees-write", !strncmp(map + 100, "WRITE", 5));
    PEER("mmap.peer-open", "open %d %s/map", O_RDWR, getcwd(path, sizeof path));
    say_number("mmap.peer-read", peer("read 0"));
    PEER("mmap.peer-map", "map %d", 2 * PAGE);
    say_number("mmap.peer-peek", peer("peek 1"));
    map[PAGE] = 77;
    say_number("mmap.peer-peek-at-once", peer("peek %d", PAGE));
    PEER("mmap.peer-poke", "poke %d 88", PAGE + 1);
    say_number("mmap.sees-peers-poke", map[PAGE + 1]);
    PEER("mmap.peer-write", "write 200 99");
    say_number("mmap.sees-peers-write", map[200]);
    TRY("mmap.msync", msync(map, 2 * PAGE, MS_SYNC));
    int other = open("map", O_RDONLY);
    pread(other, text, 1, PAGE + 1);
    say_number("mmap.read-sees-peers-poke", text[0]);
    TRY("mmap.read-only-shared-write", mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0) == MAP_FAILED ? -1 : 0);
    char *copy = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, other, 0);
    HOLDS("mmap.private", copy != MAP_FAILED);
    copy[0] = 'X';
    HOLDS("mmap.private-stays-private", map[0] == 'm');
    signal(SIGBUS, bus);
    volatile int caught = 1;
    ftruncate(fd, PAGE);
    if (sigsetjmp(beyond, 1) == 0) { text[0] = *(volatile char *)(map + PAGE); caught = 0; }
    HOLDS("mmap.sigbus-behind-the-end", caught);
    ftruncate(fd, 2 * PAGE);
    say_number("mmap.zero-after-regrowth", map[PAGE + 1]);
    close(fd);
    map[5] = '!';
    munmap(map, 2 * PAGE);
    HOLDS("mmap.written-after-close", !strncmp(contents("map"), "mappe!", 6));
    TRY("mmap.unlink", unlink("map"));
    say_number("mmap.peer-peek-after-unlink", peer("peek 5"));
    PEER("mmap.close", "close");
    close(other);
    int memory = open("exec", O_RDWR | O_CREAT, 0755);
    TRY("mmap.executable", mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, memory, 0) == MAP_FAILED ? -1 : 0);
    close(memory);
}
