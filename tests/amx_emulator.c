/* AMX-int8 for processors without it: executes the instructions' architectural definition when they trap.

   Loading this library installs a handler for SIGILL. What hardware would refuse (shapes that do not fit, a bad
   configuration) aborts. Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

typedef struct {
    atomic_int owner;
    int configured, rows[8], bytes[8];
    uint8_t tile[8][16][64];
} state;

static state states[256];
static atomic_long executed;

long amx_instructions(void) { return atomic_load(&executed); }

static void refuse(const char *why) {
    dprintf(2, "AMX: %s\n", why);
    abort();
}

static state *own(void) {
    int me = gettid();
    for (int i = 0; i < 256; i++) {
        int free_slot = 0;
        if (atomic_load(&states[i].owner) == me) return &states[i];
        if (atomic_compare_exchange_strong(&states[i].owner, &free_slot, me)) return &states[i];
    }
    refuse("too many threads");
    return NULL;
}

static uint64_t value(const ucontext_t *context, int number) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)context->uc_mcontext.gregs[order[number]];
}

typedef struct {
    uint64_t start, index;
    int length;
} operand;

/* The memory operand behind an opcode; the index register is kept apart, it is the stride of tile rows. */
static operand memory(const ucontext_t *context, const uint8_t *modrm, int x, int b) {
    int mod = *modrm >> 6, rm = *modrm & 7;
    operand found = {0, 0, 1};
    if (rm == 4) {
        int base = modrm[1] & 7, index = (modrm[1] >> 3 & 7) | x << 3;
        found.length = 2;
        if (index != 4) found.index = value(context, index) << (modrm[1] >> 6);
        if (base == 5 && mod == 0) mod = 4;
        else found.start = value(context, base | b << 3);
    } else if (rm == 5 && mod == 0) {
        int32_t offset;
        memcpy(&offset, modrm + 1, 4);
        found.length = 5;
        found.start = (uint64_t)(modrm + 5 + offset);
        return found;
    } else
        found.start = value(context, rm | b << 3);
    if (mod == 1) found.start += (uint64_t)(int64_t)(int8_t)modrm[found.length], found.length += 1;
    if (mod == 2 || mod == 4) {
        int32_t offset;
        memcpy(&offset, modrm + found.length, 4);
        found.start += (uint64_t)(int64_t)offset, found.length += 4;
    }
    return found;
}

static void configure(state *s, const uint8_t *given) {
    if (given[0] != 1 || given[1] != 0) refuse("palette or start row");
    for (int i = 2; i < 64; i++)
        if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && given[i]) refuse("reserved byte of the configuration");
    for (int i = 0; i < 8; i++) {
        s->bytes[i] = given[16 + 2 * i] | given[17 + 2 * i] << 8;
        s->rows[i] = given[48 + i];
        if (s->bytes[i] > 64 || s->rows[i] > 16 || !s->bytes[i] != !s->rows[i]) refuse("shape of a tile");
    }
    memset(s->tile, 0, sizeof s->tile);
    s->configured = 1;
}

static void multiply(state *s, int c, int a, int b) {
    if (s->rows[c] != s->rows[a] || s->bytes[c] != s->bytes[b] || s->bytes[a] != 4 * s->rows[b] ||
        s->bytes[c] % 4 || c == a || c == b || a == b)
        refuse("shapes of a product");
    for (int m = 0; m < s->rows[c]; m++)
        for (int n = 0; n < s->bytes[c] / 4; n++) {
            int32_t total;
            memcpy(&total, &s->tile[c][m][4 * n], 4);
            for (int k = 0; k < s->bytes[a]; k++)
                total += s->tile[a][m][k] * (int8_t)s->tile[b][k / 4][4 * n + k % 4];
            memcpy(&s->tile[c][m][4 * n], &total, 4);
        }
}

static void trap(int number, siginfo_t *info, void *given) {
    (void)info;
    ucontext_t *context = given;
    const uint8_t *code = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    int r = !(code[1] >> 7), x = !(code[1] >> 6 & 1), b = !(code[1] >> 5 & 1), pp = code[2] & 3;
    int vvvv = ~(code[2] >> 3) & 15, opcode = code[3], modrm = code[4], reg = modrm >> 3 & 7;
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || (opcode != 0x49 && opcode != 0x4b && opcode != 0x5e) || r) {
        signal(number, SIG_DFL);
        return;
    }
    state *s = own();
    int length = 5;
    enum { NONE, X66, XF3, XF2 };
    if (!s->configured && !(opcode == 0x49 && pp == NONE)) refuse("no configuration");
    if (opcode == 0x49 && modrm == 0xc0 && pp == NONE)
        s->configured = 0;
    else if (opcode == 0x49 && pp == XF2 && modrm >> 6 == 3)
        memset(s->tile[reg], 0, sizeof s->tile[reg]);
    else if (opcode == 0x49 && pp == NONE) {
        operand from = memory(context, code + 4, x, b);
        configure(s, (const uint8_t *)(from.start + from.index));
        length = 4 + from.length;
    } else if (opcode == 0x4b && (pp == XF2 || pp == XF3)) {
        operand at = memory(context, code + 4, x, b);
        if (pp == XF2) memset(s->tile[reg], 0, sizeof s->tile[reg]);
        for (int i = 0; i < s->rows[reg]; i++) {
            void *line = (void *)(at.start + (uint64_t)i * at.index);
            if (pp == XF2) memcpy(s->tile[reg][i], line, (size_t)s->bytes[reg]);
            else memcpy(line, s->tile[reg][i], (size_t)s->bytes[reg]);
        }
        length = 4 + at.length;
    } else if (opcode == 0x5e && pp == X66)
        multiply(s, reg, modrm & 7, vvvv);
    else
        refuse("an instruction that is not emulated");
    atomic_fetch_add(&executed, 1);
    context->uc_mcontext.gregs[REG_RIP] += length;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {0};
    action.sa_sigaction = trap;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, NULL);
}
