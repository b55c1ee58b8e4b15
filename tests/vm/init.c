/* The guest's init in the VM tests: prints what it sees of its machine, then ends it as "husk.test=..." on the command line says. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/sysinfo.h>
#include <sys/random.h>
#include <linux/fs.h>
#include <linux/netlink.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "hostile.h"

static void print_file(const char *label, const char *path) {
    char text[4096] = "";
    int fd = open(path, O_RDONLY);
    ssize_t len = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (len > 0 && text[len - 1] == '\n') text[len - 1] = 0;
    printf("%s=%s\n", label, len < 0 ? "none" : text);
}

static void print_devices(const char *bus) {
    char path[512];
    DIR *dir = opendir(bus);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s/device", bus, entry->d_name);
        printf("device %s ", entry->d_name);
        print_file("id", path);
    }
    if (dir) closedir(dir);
}

/* Dials the host as the agent does, sends a line and prints the answer. */
static void talk(void) {
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = 1024};
    char answer[64] = "";
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&host, sizeof host) || write(fd, "hello", 5) != 5 || read(fd, answer, 63) <= 0)
        perror("vsock");
    printf("vsock=%s\n", answer);
    close(fd);
}

/* Reads and writes files of the share with tag "share". */
static void use_files(void) {
    if (mount("share", "/tmp", "virtiofs", 0, "")) perror("virtiofs");
    print_file("file", "/tmp/question");
    int fd = open("/tmp/volume/answer", O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (fd < 0 || write(fd, "42", 2) != 2 || fsync(fd)) perror("answer");
    /* The mount below, which the guest made of the host's, goes with it. */
    if (umount2("/tmp", MNT_DETACH)) perror("umount");
}

/* Takes so many MiB of memory, or gives them back. */
static void hold(size_t mib) {
    static void *held;
    static size_t len;
    if (held) munmap(held, len);
    held = NULL;
    len = mib << 20;
    if (!len) return;
    held = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (held == MAP_FAILED) perror("mmap");
    for (size_t at = 0; at < len; at += 4096) ((volatile char *)held)[at] = 1;
}

static void copy_file(const char *path, int to) {
    char text[4096];
    int fd = open(path, O_RDONLY);
    for (ssize_t len; fd >= 0 && (len = read(fd, text, sizeof text)) > 0;)
        if (write(to, text, len) != len) perror("write");
    close(fd);
}

/* Waits for the host as the agent of a template does: listens, tells so on the console, then answers who connects. */
static void wait_for_host(void) {
    struct sockaddr_vm any = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 1024};
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 1)) perror("listen");
    printf("waiting\n");
    for (;;) {
        char command[256] = "";
        unsigned char random[16];
        struct timespec now;
        int fd = accept(listener, NULL, NULL);
        if (fd < 0 || read(fd, command, sizeof command - 1) <= 0) perror("accept");
        if (!strcmp(command, "files")) use_files();
        if (!strncmp(command, "hold ", 5)) hold(strtoul(command + 5, NULL, 10));
        if (!strncmp(command, "read ", 5)) {
            copy_file(command + 5, fd);
            close(fd);
            continue;
        }
        if (!strcmp(command, "off")) return;
        for (int cpu = 0; cpu < get_nprocs(); cpu++) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(cpu, &set);
            if (sched_setaffinity(0, sizeof set, &set)) perror("affinity");
            clock_gettime(CLOCK_MONOTONIC, &now);
            dprintf(fd, "cpu%d monotonic=%ld.%09ld random=", cpu, (long)now.tv_sec, now.tv_nsec);
            if (getrandom(random, sizeof random, 0) != sizeof random) perror("random");
            for (size_t i = 0; i < sizeof random; i++) dprintf(fd, "%02x", random[i]);
            dprintf(fd, "\n");
        }
        close(fd);
    }
}

/* Reads and writes a disk that has just come, and says what it saw. */
static void use_disk(const char *name) {
    static char data[512] __attribute__((aligned(512)));
    char path[128], serial[64] = "", sectors[64] = "", ro[8] = "", first[64] = "";
    struct { const char *file; char *text; size_t len; } attributes[] = {
        {"serial", serial, sizeof serial}, {"size", sectors, sizeof sectors}, {"ro", ro, sizeof ro}};
    for (size_t at = 0; at < 3; at++) {
        snprintf(path, sizeof path, "/sys/block/%s/%s", name, attributes[at].file);
        int fd = open(path, O_RDONLY);
        if (fd < 0 || read(fd, attributes[at].text, attributes[at].len - 1) < 0) perror(path);
        attributes[at].text[strcspn(attributes[at].text, "\n")] = 0;
        close(fd);
    }
    snprintf(path, sizeof path, "/dev/%s", name);
    int fd = open(path, ro[0] == '1' ? O_RDONLY : O_RDWR);
    if (fd < 0 || pread(fd, data, 512, 0) != 512) perror(path);
    snprintf(first, sizeof first, "%.32s", data);
    memset(data, 0, sizeof data);
    strcpy(data, "written by a guest");
    /* Page cache on the way down, then a flush; a range made zeroes. */
    unsigned long long range[] = {1024, 512};
    int written = pwrite(fd, data, 512, 512) == 512 && !fsync(fd) && !ioctl(fd, BLKZEROOUT, range);
    close(fd);
    printf("disk %s serial=%s sectors=%s ro=%s first=%s written=%d\n", name, serial, sectors, ro, first, written);
}

/* Tells of disks as the kernel does (Documentation/ABI/testing/sysfs-uevent and kobject_uevent(9): text, NUL, variables). */
static void watch_disks(void) {
    struct sockaddr_nl all = {.nl_family = AF_NETLINK, .nl_groups = 1};
    int fd = socket(AF_NETLINK, SOCK_DGRAM, NETLINK_KOBJECT_UEVENT);
    if (fd < 0 || bind(fd, (struct sockaddr *)&all, sizeof all)) perror("uevents");
    printf("ready\n");
    for (;;) {
        char event[8192] = "";
        if (recv(fd, event, sizeof event - 1, 0) < 0) perror("uevent");
        char *name = strstr(event, "/block/");
        if (!name || strchr(name + 7, '/')) continue;
        if (!strncmp(event, "add@", 4)) use_disk(name + 7);
        if (!strncmp(event, "remove@", 7)) printf("gone %s\n", name + 7);
    }
}

int main(void) {
    char cmdline[4096] = "";
    setvbuf(stdout, NULL, _IONBF, 0);
    mount("proc", "/proc", "proc", 0, "");
    mount("sysfs", "/sys", "sysfs", 0, "");
    mount("devtmpfs", "/dev", "devtmpfs", 0, "");
    int fd = open("/proc/cmdline", O_RDONLY);
    if (read(fd, cmdline, sizeof cmdline - 1) < 0) perror("cmdline");
    printf("hello from init\n");
    struct sysinfo info;
    sysinfo(&info);
    printf("cpus=%d\nmemory=%lu\n", get_nprocs(), info.totalram * info.mem_unit >> 20);
    print_file("clocksource", "/sys/devices/system/clocksource/clocksource0/current_clocksource");
    print_file("rng", "/sys/class/misc/hw_random/rng_current");
    print_devices("/sys/bus/pci/devices");
    const char *test = strstr(cmdline, "husk.test=");
    test = test ? test + strlen("husk.test=") : "poweroff";
    if (!strncmp(test, "vsock", 5)) talk();
    if (!strncmp(test, "files", 5)) use_files();
    if (!strncmp(test, "disks", 5)) watch_disks();
    if (!strncmp(test, "hostile", 7)) be_hostile();
    printf("ready\n");
    if (!strncmp(test, "template", 8)) wait_for_host();
    sync();
    if (!strncmp(test, "reboot", 6)) reboot(RB_AUTOBOOT);
    if (!strncmp(test, "panic", 5)) {
        fd = open("/proc/sysrq-trigger", O_WRONLY);
        if (write(fd, "c", 1) < 0) return 1; /* init's exit panics too */
    }
    if (!strncmp(test, "wait", 4))
        for (;;) {
            sleep(1);
            printf("tick\n");
        }
    reboot(RB_POWER_OFF);
    pause();
}
