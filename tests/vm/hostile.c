/* Drives virtio-mem by hand from user space, as a hostile kernel would, and prints the type of each response. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "hostile.h"

enum { PLUG, UNPLUG, UNPLUG_ALL, STATE };
#define BLOCK (2ull << 20)

static volatile uint8_t *bar;   /* BAR 0 as husk-vmm lays it out: common configuration, 0x2000 device, 0x3000 notifications */
static volatile uint8_t *page;  /* rings at 0, 0x400 and 0x600, a request at 0x800, a response at 0x900 */
static uint64_t physical;
static uint16_t added;

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) perror(path);
    close(fd);
}

static void set(int at, int len, uint64_t value) {
    if (len == 1) bar[at] = value;
    if (len == 2) *(volatile uint16_t *)(bar + at) = value;
    if (len == 4) *(volatile uint32_t *)(bar + at) = value;
    if (len == 8) set(at, 4, value), set(at + 4, 4, value >> 32);
}

static uint64_t config(int at) { return *(volatile uint32_t *)(bar + 0x2000 + at) | (uint64_t)*(volatile uint32_t *)(bar + 0x2004 + at) << 32; }

/* Takes the device from the kernel's driver; maps its registers, and a page whose place in physical memory pagemap tells. */
static int take(void) {
    char path[600], text[16];
    DIR *dir = opendir("/sys/bus/pci/devices");
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/device", entry->d_name);
        int fd = open(path, O_RDONLY);
        ssize_t len = read(fd, text, sizeof text);
        close(fd);
        if (len < 6 || strncmp(text, "0x1058", 6)) continue;
        put("/sys/bus/pci/drivers/virtio-pci/unbind", entry->d_name);
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/enable", entry->d_name);
        put(path, "1");
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/resource0", entry->d_name);
        fd = open(path, O_RDWR | O_SYNC);
        bar = mmap(NULL, 0x8000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        break;
    }
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (pread(fd, &entry, 8, (uintptr_t)page / 4096 * 8) != 8) perror("pagemap");
    close(fd);
    physical = (entry & ((1ull << 55) - 1)) * 4096;
    if (!bar || bar == MAP_FAILED || !physical) perror("take");
    return bar && bar != MAP_FAILED && physical;
}

/* Brings the device up with its rings at a guest-physical address. Its status then. */
static int start(uint64_t rings, uint32_t features) {
    memset((void *)page, 0, 4096);
    added = 0;
    set(20, 1, 0);
    set(20, 1, 1);
    set(20, 1, 3);
    set(8, 4, 0), set(12, 4, features);
    set(8, 4, 1), set(12, 4, 1);
    set(20, 1, 11);
    set(22, 2, 0), set(24, 2, 16);
    set(32, 8, rings), set(40, 8, rings + 0x400), set(48, 8, rings + 0x600);
    set(28, 2, 1);
    set(20, 1, 15);
    return bar[20];
}

static void describe(int number, uint64_t address, uint32_t len, uint16_t flags) {
    volatile uint8_t *at = page + 16 * number;
    *(volatile uint64_t *)at = address;
    *(volatile uint32_t *)(at + 8) = len;
    *(volatile uint16_t *)(at + 12) = flags;
    *(volatile uint16_t *)(at + 14) = number + 1;
}

/* Sends a request whose bytes are at one guest-physical address and whose response goes to another: the response's type if it came to the
   page, 99 if the device said nothing for 5 s. */
static int send_at(uint64_t request, uint64_t response) {
    describe(0, request, 24, 1);
    describe(1, response, 10, 2);
    page[0x900] = 77;
    *(volatile uint16_t *)(page + 0x404 + 2 * (added % 16)) = 0;
    __sync_synchronize();
    *(volatile uint16_t *)(page + 0x402) = ++added;
    __sync_synchronize();
    set(0x3000, 2, 0);
    for (int round = 0; round < 5000; round++) {
        if (*(volatile uint16_t *)(page + 0x602) == added) return page[0x900];
        usleep(1000);
    }
    return 99;
}

struct request { uint64_t type, address, blocks; };

/* Sends requests and prints the responses' types in one line. */
static void ask_all(const char *label, const struct request *requests, int count) {
    printf("%s:", label);
    for (int at = 0; at < count; at++) {
        memcpy((void *)(page + 0x800), &requests[at], 24);
        printf(" %d", send_at(physical + 0x800, physical + 0x900));
    }
    printf("\n");
}

void be_hostile(void) {
    if (!take()) return;
    printf("without the feature: status %#x\n", start(physical, 0) & 0xf);
    for (int round = 0; round < 5000 && !(bar[20] & 0x40); round++) usleep(1000);
    printf("then: status %#x\n", bar[20]);
    printf("with it: status %#x\n", start(physical, 2));
    uint64_t region = config(16), len = config(24);
    struct request early[] = {{PLUG, region, 1}, {STATE, region, 1}, {UNPLUG_ALL, 0, 0}};
    ask_all("before", early, 3);
    printf("waiting\n");
    for (int round = 0; round < 20000 && config(48) != 64 * BLOCK; round++) usleep(1000);
    int usable = config(32) / BLOCK;
    printf("usable: %d\n", usable);
    struct request wrong[] = {{PLUG, region, usable + 1}, {PLUG, region + 4096, 1}, {PLUG, region, 0}, {PLUG, region - BLOCK, 1},
                              {PLUG, region + len, 1}, {PLUG, -BLOCK, 1}, {UNPLUG, physical & -BLOCK, 1}, {UNPLUG, 0, 1},
                              {UNPLUG, region, 1}, {9, region, 1}};
    ask_all("wrong", wrong, 10);
    struct request plug[] = {{PLUG, region, 64}, {PLUG, region, 1}, {PLUG, region + 64 * BLOCK, 1}};
    ask_all("plugged", plug, 3);
    struct request unplug[] = {{UNPLUG, region, 65}, {UNPLUG, region + BLOCK, 2}, {UNPLUG, region + BLOCK, 2}, {UNPLUG, region, 3}};
    ask_all("unplugged", unplug, 4);
    /* Bytes from and to memory that was never plugged: zeroes there are a request to plug what is no memory. */
    int from = send_at(region + len - 4096, physical + 0x900), to = send_at(physical + 0x800, region + len - 4096);
    printf("elsewhere: %d %d\n", from, to);
    printf("out of memory: %d\n", send_at(region + len, physical + 0x900));
    for (int round = 0; round < 5000 && !(bar[20] & 0x40); round++) usleep(1000);
    printf("then: status %#x\n", bar[20]);
    printf("rings elsewhere: status %#x\n", start(region + len - 4096, 2));
    set(0x3000, 2, 0);
    printf("done\n");
}
