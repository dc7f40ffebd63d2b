/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Follows a process through its system calls, counted over all of its threads and children, and at one of them ends
 * it, brings it a signal, or has the call fail (ptrace(2)). What the tests call is `walk`; walking.py says how.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum how { LIST, KILL, KILL_AFTER, FAIL, FAIL_EVER, SIGNAL };

enum { NUMBERS = 1024, PATH = 160, THREADS = 512 };

/* What is known of a system call: which argument is a path (1 is the first; 0: none), and what it is not to be. */
struct kind {
    uint8_t path;
    uint8_t uncounted;  /* threads wait for each other a different number of times in each run */
    uint8_t done_first; /* fails after it was done, as close(2) does */
    uint8_t infallible;
};

struct order {
    uint32_t how;
    uint32_t value;  /* the errno or the signal */
    uint64_t call;   /* by the kernel's number */
    uint64_t number; /* which one of these, from 1 */
    double seconds;  /* then it counts as stuck, and is killed */
};

struct call {
    uint64_t number;
    uint64_t arguments[6];
    int64_t result;
    uint64_t thread; /* 0 is the first */
    char path[PATH];
};

struct found {
    uint64_t counted;
    int32_t status; /* as waitpid(2) gives it */
    uint32_t fired;
    uint32_t stuck;
    struct call at;
};

int walk(pid_t pid, int go, const char *marker, const struct kind kinds[NUMBERS], const struct order *order,
         struct found *ret_found, struct call *ret_calls, size_t most);

static volatile sig_atomic_t late;

static void on_alarm(int number) {
    (void)number;
    late = 1;
}

static void read_text(pid_t thread, uint64_t address, char text[PATH]) {
    /* A path may end right before memory that is not there. */
    size_t room = PATH - 1, until_page = 4096 - (size_t)(address & 4095);
    struct iovec here = {text, room};
    struct iovec there[2] = {{(void *)(uintptr_t)address, room}, {NULL, 0}};
    size_t parts = 1;
    if (until_page < room) {
        there[0].iov_len = until_page;
        there[1] = (struct iovec){(void *)(uintptr_t)(address + until_page), room - until_page};
        parts = 2;
    }
    ssize_t length = address != 0 ? process_vm_readv(thread, &here, 1, there, parts, 0) : 0;
    text[length > 0 ? length : 0] = '\0';
}

struct thread {
    pid_t id;
    uint64_t call; /* the counted one that it is in; 0: none */
    bool failing;
    bool ending;
};

static struct thread *thread_of(struct thread threads[THREADS], size_t *count, pid_t id) {
    for (size_t i = 0; i < *count; i++)
        if (threads[i].id == id)
            return &threads[i];
    if (*count == THREADS)
        return NULL;
    threads[*count] = (struct thread){.id = id};
    return &threads[(*count)++];
}

/* At its entry: have the kernel do nothing. At its exit: have it return a value. */
#if defined(__x86_64__)
static int skip(pid_t thread) {
    return (int)ptrace(PTRACE_POKEUSER, thread, offsetof(struct user_regs_struct, orig_rax), (void *)-1L);
}

static int give(pid_t thread, long value) {
    return (int)ptrace(PTRACE_POKEUSER, thread, offsetof(struct user_regs_struct, rax), (void *)value);
}
#elif defined(__aarch64__)
static int skip(pid_t thread) {
    int none = -1;
    struct iovec number = {&none, sizeof none};
    return (int)ptrace(PTRACE_SETREGSET, thread, (void *)NT_ARM_SYSTEM_CALL, &number);
}

static int give(pid_t thread, long value) {
    struct user_regs_struct registers;
    struct iovec all = {&registers, sizeof registers};
    if (ptrace(PTRACE_GETREGSET, thread, (void *)NT_PRSTATUS, &all) < 0)
        return -1;
    registers.regs[0] = (unsigned long long)value;
    return (int)ptrace(PTRACE_SETREGSET, thread, (void *)NT_PRSTATUS, &all);
}
#else
#error "how a system call is skipped here is not known"
#endif

struct state {
    pid_t pid;
    const char *marker;
    const struct kind *kinds;
    const struct order *order;
    struct found *found;
    struct call *calls;
    size_t most;
    bool begun;
    bool done; /* nothing more is to be looked at */
    uint64_t counts[NUMBERS];
    struct thread threads[THREADS];
    size_t count;
};

static void describe(const struct state *state, pid_t id, const struct thread *thread,
                     const struct __ptrace_syscall_info *info, struct call *ret_call) {
    uint64_t number = info->entry.nr;
    *ret_call = (struct call){.number = number, .thread = (uint32_t)(thread - state->threads)};
    memcpy(ret_call->arguments, info->entry.args, sizeof ret_call->arguments);
    if (number < NUMBERS && state->kinds[number].path > 0)
        read_text(id, info->entry.args[state->kinds[number].path - 1], ret_call->path);
}

static void enter(struct state *state, pid_t id, struct thread *thread, const struct __ptrace_syscall_info *info) {
    const struct order *order = state->order;
    struct found *found = state->found;
    uint64_t number = info->entry.nr;
    struct kind kind = number < NUMBERS ? state->kinds[number] : (struct kind){0};
    thread->call = 0;
    thread->failing = thread->ending = false;
    if (!state->begun) {
        char path[PATH];
        if (number != SYS_openat)
            return;
        read_text(id, info->entry.args[1], path);
        state->begun = strcmp(path, state->marker) == 0;
        return;
    }
    if (kind.uncounted)
        return;
    thread->call = ++found->counted;
    if (order->how == LIST) {
        if (found->counted <= state->most)
            describe(state, id, thread, info, &state->calls[found->counted - 1]);
        return;
    }
    if (number != order->call || ++state->counts[number] < order->number)
        return;
    if (found->fired++ == 0)
        describe(state, id, thread, info, &found->at);
    else if (order->how != FAIL_EVER)
        return;
    switch (order->how) {
    case KILL:
        kill(state->pid, SIGKILL);
        break;
    case KILL_AFTER:
        thread->ending = true;
        break;
    case SIGNAL:
        kill(state->pid, (int)order->value);
        state->done = true;
        break;
    case FAIL:
    case FAIL_EVER:
        if (kind.infallible) {
            state->done = order->how == FAIL;
            break;
        }
        if (!kind.done_first)
            skip(id);
        thread->failing = true;
        break;
    default:
        break;
    }
}

static void leave(struct state *state, pid_t id, struct thread *thread, const struct __ptrace_syscall_info *info) {
    const struct order *order = state->order;
    if (order->how == LIST && thread->call > 0 && thread->call <= state->most)
        state->calls[thread->call - 1].result = info->exit.rval;
    if (thread->ending)
        kill(state->pid, SIGKILL);
    if (thread->failing) {
        give(id, -(long)order->value);
        thread->failing = false;
        state->done = order->how == FAIL;
    }
    thread->call = 0;
}

/* Takes one stop; returns the signal with which to go on, or -1 where it is to stay stopped. */
static int take(struct state *state, pid_t id, int status) {
    int number = WSTOPSIG(status), event = status >> 16;
    struct thread *thread = thread_of(state->threads, &state->count, id);
    struct __ptrace_syscall_info info;
    if (event == PTRACE_EVENT_STOP)
        return number == SIGSTOP || number == SIGTSTP || number == SIGTTIN || number == SIGTTOU ? -1 : 0;
    if (event != 0)
        return 0;
    if (number != (SIGTRAP | 0x80))
        return number;
    if (thread == NULL || state->done || ptrace(PTRACE_GET_SYSCALL_INFO, id, (void *)sizeof info, &info) < 0)
        return 0;
    if (info.op == PTRACE_SYSCALL_INFO_ENTRY)
        enter(state, id, thread, &info);
    else if (info.op == PTRACE_SYSCALL_INFO_EXIT)
        leave(state, id, thread, &info);
    return 0;
}

/*
 * Follows `pid`, a child of the caller's that waits for a byte in `go`, until it ends. Counting begins after it tried
 * to open `marker`. Returns 0 or -errno.
 */
int walk(pid_t pid, int go, const char *marker, const struct kind kinds[NUMBERS], const struct order *order,
         struct found *ret_found, struct call *ret_calls, size_t most) {
    static struct state state;
    struct itimerval deadline = {
        .it_value = {(time_t)order->seconds, (suseconds_t)((order->seconds - (double)(time_t)order->seconds) * 1e6)},
        .it_interval = {0, 100000},
    };
    struct sigaction action = {.sa_handler = on_alarm};
    int status;
    const unsigned long options =
        PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACEEXEC;
    memset(&state, 0, sizeof state);
    memset(ret_found, 0, sizeof *ret_found);
    state.pid = pid;
    state.marker = marker;
    state.kinds = kinds;
    state.order = order;
    state.found = ret_found;
    state.calls = ret_calls;
    state.most = most;
    state.threads[0].id = pid;
    state.count = 1;
    if (ptrace(PTRACE_SEIZE, pid, NULL, (void *)options) < 0)
        return -errno;
    if (ptrace(PTRACE_INTERRUPT, pid, NULL, NULL) < 0 || waitpid(pid, &status, __WALL) < 0 ||
        ptrace(PTRACE_SYSCALL, pid, NULL, NULL) < 0)
        return -errno;
    if (write(go, ".", 1) != 1)
        return -errno;
    late = 0;
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &deadline, NULL);
    for (;;) {
        pid_t id = waitpid(-1, &status, __WALL);
        if (late && !ret_found->stuck) {
            ret_found->stuck = 1;
            kill(pid, SIGKILL);
        }
        if (id < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (!WIFSTOPPED(status)) {
            if (id != pid)
                continue;
            ret_found->status = status;
            return 0;
        }
        int number = take(&state, id, status);
        if (number < 0)
            ptrace(PTRACE_LISTEN, id, NULL, NULL);
        else /* a thread that was just killed cannot go on */
            ptrace(state.done ? PTRACE_CONT : PTRACE_SYSCALL, id, NULL, (void *)(intptr_t)number);
    }
}
