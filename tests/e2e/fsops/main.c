/* fsops PLACE DIRECTORY [SOCKET]: all operations in DIRECTORY, with a peer that listens on SOCKET (else a child).
 * fsops peer SOCKET: the peer. fsops show-ids: prints what a program with file capabilities or set-user-id has become. */
#include "fsops.h"

#include <grp.h>
#include <linux/capability.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static const char *place;
const char *self;

void say(const char *label, const char *outcome) {
    printf("%s %s %s\n", place, label, outcome);
    fflush(stdout);
}

void say_number(const char *label, long long number) {
    char text[32];
    snprintf(text, sizeof text, "%lld", number);
    say(label, text);
}

int file(const char *path, const char *text) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text)) say(path, "COULD NOT BE MADE");
    return fd;
}

const char *contents(const char *path) {
    static char buffer[4096];
    int fd = open(path, O_RDONLY);
    ssize_t length = fd < 0 ? -1 : read(fd, buffer, sizeof buffer - 1);
    if (fd >= 0) close(fd);
    if (length < 0) return strerrorname_np(errno);
    buffer[length] = 0;
    return buffer;
}

void as(uid_t user, gid_t group, void (*what)(void)) {
    pid_t child = fork();
    if (child == 0) {
        if (setgroups(0, NULL) || setresgid(group, group, group) || setresuid(user, user, user)) say("as", strerrorname_np(errno));
        else what();
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

void say_mode(const char *label, const char *path) {
    struct stat stat;
    char text[16];
    if (lstat(path, &stat)) { say(label, strerrorname_np(errno)); return; }
    snprintf(text, sizeof text, "%04o", stat.st_mode & 07777);
    say(label, text);
}

static int show_ids(void) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    syscall(SYS_capget, &header, data);
    printf("euid %d egid %d effective %x\n", geteuid(), getegid(), data[0].effective);
    return 0;
}

int main(int count, char **words) {
    if (count == 2 && !strcmp(words[1], "show-ids")) return show_ids();
    if (count == 3 && !strcmp(words[1], "peer")) return peer_main(words[2]);
    if (count < 3) return 2;
    static const struct { const char *name; void (*run)(void); } sections[] = {
        {"locks", locks}, {"names", names}, {"content", content}, {"mapped", mapped}, {"attributes", attributes},
        {"extended", extended}, {"special", special}, {"directories", directories}, {"limits", limits}};
    char path[4096];
    self = "/proc/self/exe";
    place = words[1];
    alarm(100);
    umask(022);
    peer_connect(count > 3 ? words[3] : NULL);
    for (size_t i = 0; i < sizeof sections / sizeof *sections; i++) {
        snprintf(path, sizeof path, "%s/%s", words[2], sections[i].name);
        if (mkdir(path, 0755) || chdir(path)) { say(path, strerrorname_np(errno)); return 1; }
        sections[i].run();
    }
    say("all", "done");
    return 0;
}
