// A fiber: a function on a stack of its own, and the switch between two of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__) && !defined(SHIM_UCONTEXT)
#define SHIM_SWITCH
#else
#include <ucontext.h>
#endif

namespace shim {

#ifdef SHIM_SWITCH
// ucontext makes a system call at every switch; a test makes millions of them.
extern "C" void shim_switch(void** save, void* to);
asm(R"(
.text
.globl shim_switch
shim_switch:
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
  ret
)");
#endif

struct Fiber {
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kStack = 256 << 10;
#else
  static constexpr size_t kStack = 64 << 10;
#endif
  char* stack = nullptr;  // null: the thread that called the launch
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
#ifdef SHIM_SWITCH
  void* top = nullptr;
#else
  ucontext_t context;
#endif

  // Makes it ready to run `entry`, which must never return.
  void prepare(void (*entry)()) {
    if (!stack) stack = static_cast<char*>(std::aligned_alloc(64, kStack));
    bottom = stack;
    size = kStack;
    fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, kStack);  // what an earlier fiber left
#endif
#ifdef SHIM_SWITCH
    void** words = reinterpret_cast<void**>(stack + kStack) - 8;
    for (int i = 0; i < 6; i++) words[i] = nullptr;
    words[6] = reinterpret_cast<void*>(entry);
    words[7] = nullptr;  // return address of `entry`
    top = words;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
  }

  // First thing on a fiber that was switched to; `from` learns its stack's bounds where they are not known.
  static void arrived(Fiber& self, Fiber* from) {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(self.fake_stack, &bottom, &size);
    if (from && !from->bottom) {
      from->bottom = bottom;
      from->size = size;
    }
#else
    (void)self;
    (void)from;
#endif
  }

  // `last`: this fiber never runs again.
  void switch_to(Fiber& to, bool last = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, to.bottom, to.size);
#else
    (void)last;
#endif
#ifdef SHIM_SWITCH
    shim_switch(&top, to.top);
#else
    swapcontext(&context, &to.context);
#endif
    arrived(*this, nullptr);
  }
};

}  // namespace shim
