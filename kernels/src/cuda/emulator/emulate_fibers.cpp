// Stacks, and the switch from one to another.

#include "emulate_state.hpp"

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulate {

constexpr size_t STACK = 128 << 10;
constexpr size_t PAGE = 4096;

static std::vector<Fiber*> free_fibers, all_fibers;
static Fiber host;

static void fiber_main();

#ifdef __x86_64__
// It leaves by a jump: the processor predicts a return to where the last call came from, which is another thread's.
extern "C" void kiln_emulate_switch(void** from, void* to);
__asm__(R"(
.text
.type kiln_emulate_switch, @function
.hidden kiln_emulate_switch
.globl kiln_emulate_switch
kiln_emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
.size kiln_emulate_switch, .-kiln_emulate_switch
)");
static void switch_to(Fiber* from, Fiber* to) {
    kiln_emulate_switch(&from->context, to->context);
}
static void prepare(Fiber* fiber) {
    // Six registers, the address to return to, and a word that keeps the stack aligned as after a call.
    void** top = (void**)fiber->high - 8;
    memset(top, 0, 8 * sizeof(void*));
    top[6] = (void*)fiber_main;
    fiber->context = top;
}
#else
static void switch_to(Fiber* from, Fiber* to) {
    if (from->context == nullptr) {
        from->context = new ucontext_t;
    }
    swapcontext((ucontext_t*)from->context, (ucontext_t*)to->context);
}
static void prepare(Fiber* fiber) {
    if (fiber->context == nullptr) {
        fiber->context = new ucontext_t;
    }
    ucontext_t* context = (ucontext_t*)fiber->context;
    getcontext(context);
    context->uc_stack.ss_sp = fiber->low;
    context->uc_stack.ss_size = (size_t)(fiber->high - fiber->low);
    context->uc_link = nullptr;
    makecontext(context, fiber_main, 0);
}
#endif

static Fiber* take_fiber() {
    if (free_fibers.empty()) {
        constexpr size_t MANY = 64;
        u8* slab = (u8*)mmap(nullptr, MANY * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (slab == MAP_FAILED) {
            fail("the host has no memory left for stacks");
        }
        for (size_t i = 0; i < MANY; ++i) {
            u8* low = slab + i * STACK;
            mprotect(low, PAGE, PROT_NONE);
            // Tops at different distances from a page's end, so that the stacks' hot lines do not share cache sets.
            const size_t colour = all_fibers.size() % 63 * 64;
            Fiber* fiber = new Fiber{nullptr, low + PAGE, low + STACK - colour};
            all_fibers.push_back(fiber);
            free_fibers.push_back(fiber);
        }
        std::reverse(free_fibers.end() - MANY, free_fibers.end());
    }
    Fiber* fiber = free_fibers.back();
    free_fibers.pop_back();
    prepare(fiber);
    return fiber;
}

} // namespace emulate
