// Runs CUDA device code on the CPU, for tests: the part of CUDA that models/ops/csrc/cuda/*.cuh uses, and no more.
//
// The 32 lanes of a warp are fibers of one thread. A lane runs until it meets its warp (a shuffle, a ballot), puts its
// value on the table and gives way; when all 32 have, each goes on with what the others put there. Warps and blocks run
// one after the other, so atomics are plain sums, and shared memory is static memory, or of the size that the launch
// says. The lanes must meet at the same point: anything else is undefined on a GPU, and ends the program here.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define DEFORMABLE_VECTOR_ATOMICS  // as on sm_90

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 1 << 18;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulation: %s\n", message);
  std::abort();
}

enum class Meeting { kNone, kShuffle, kBallot, kSync };

/// The lanes of the warp that runs.
class Warp {
 public:
  Warp() {
    for (Lane& lane : lanes_) lane.stack.resize(kStackBytes);
  }

  /// Runs `body` once in every lane.
  void run(unsigned first_thread, const std::function<void()>& body) {
    body_ = &body;
    for (int i = 0; i < kLanes; ++i) start(lanes_[i]);
    for (int round = 0, left = kLanes; left > 0; ++round) {
      left = 0;
      for (int k = 0; k < kLanes; ++k) {
        const int i = round % 2 ? kLanes - 1 - k : k;  // no lane may rely on being the first
        if (lanes_[i].finished) continue;
        current_ = i;
        threadIdx.x = first_thread + i;
        enter(lanes_[i]);
        left += !lanes_[i].finished;
      }
      check_meeting(left);
    }
  }

  /// Puts a value on the table, waits for the other lanes; `read` then gets at all values.
  template <class X, class Read>
  auto meet(Meeting meeting, unsigned mask, X x, const Read& read) {
    static_assert(sizeof(X) <= sizeof(uint64_t) && std::is_trivially_copyable_v<X>);
    if (mask != 0xffffffffu) fail("only whole warps can meet");
    Lane& lane = lanes_[current_];
    // Two tables take turns: the first lanes to go on may be at their next meeting before the last have read.
    uint64_t* table = tables_[lane.meetings++ % 2];
    std::memcpy(&table[current_], &x, sizeof x);
    lane.meeting = meeting;
    leave(lane);
    return read(current_, [table](int other) {
      X value;
      std::memcpy(&value, &table[other], sizeof value);
      return value;
    });
  }

 private:
  struct Lane {
    ucontext_t context;
    std::vector<char> stack;
    bool finished;
    Meeting meeting;
    int meetings;
    void* fake_stack;
  };

  static Warp*& running() {
    static Warp* warp = nullptr;
    return warp;
  }

  void start(Lane& lane) {
    running() = this;
    lane.finished = false;
    lane.meeting = Meeting::kNone;
    lane.meetings = 0;
    lane.fake_stack = nullptr;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, &Warp::lane_main, 0);
  }

  static void lane_main() {
    Warp& warp = *running();
    finish_switch(nullptr, &warp.own_stack_, &warp.own_stack_size_);
    (*warp.body_)();
    Lane& lane = warp.lanes_[warp.current_];
    lane.finished = true;
    start_switch(nullptr, warp.own_stack_, warp.own_stack_size_);
    setcontext(&warp.own_context_);
  }

  void enter(Lane& lane) {
    void* fake_stack = nullptr;
    start_switch(&fake_stack, lane.stack.data(), lane.stack.size());
    swapcontext(&own_context_, &lane.context);
    finish_switch(fake_stack, nullptr, nullptr);
  }

  void leave(Lane& lane) {
    start_switch(&lane.fake_stack, own_stack_, own_stack_size_);
    swapcontext(&lane.context, &own_context_);
    finish_switch(lane.fake_stack, &own_stack_, &own_stack_size_);
  }

  void check_meeting(int waiting) const {
    if (waiting == 0) return;
    if (waiting != kLanes) fail("some lanes wait for lanes that have returned");
    for (const Lane& lane : lanes_) {
      const bool same = lane.meeting == lanes_[0].meeting && lane.meetings == lanes_[0].meetings;
      if (!same) fail("lanes wait at different points");
    }
  }

  // AddressSanitizer wants to know which stack is in use.
#ifdef __SANITIZE_ADDRESS__
  static void start_switch(void** fake_stack, const void* stack, std::size_t size) {
    __sanitizer_start_switch_fiber(fake_stack, stack, size);
  }
  static void finish_switch(void* fake_stack, const void** stack, std::size_t* size) {
    __sanitizer_finish_switch_fiber(fake_stack, stack, size);
  }
#else
  static void start_switch(void**, const void*, std::size_t) {}
  static void finish_switch(void*, const void**, std::size_t*) {}
#endif

  Lane lanes_[kLanes];
  uint64_t tables_[2][kLanes] = {};
  ucontext_t own_context_;
  const void* own_stack_ = nullptr;
  std::size_t own_stack_size_ = 0;
  const std::function<void()>* body_ = nullptr;
  int current_ = 0;
};

inline Warp& warp() {
  static Warp only;
  return only;
}

inline void* shared_of_block = nullptr;

/// What `kernel<<<blocks, threads, shared_bytes>>>(arguments...)` does.
struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
                  Arguments... arguments) const {
    if (threads % kLanes) fail("a block must consist of whole warps");
    std::vector<float4> shared((shared_bytes + sizeof(float4) - 1) / sizeof(float4));
    shared_of_block = shared.data();
    blockDim.x = threads;
    gridDim.x = static_cast<unsigned>(blocks);
    const std::function<void()> body = [&] { kernel(arguments...); };
    for (int64_t block = 0; block < blocks; ++block) {
      blockIdx.x = static_cast<unsigned>(block);
      for (int first = 0; first < threads; first += kLanes) warp().run(first, body);
    }
  }
};

template <class X>
void check_aligned(const X* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(X)) fail("misaligned access");
}

}  // namespace emulation

inline void* shared_memory() { return emulation::shared_of_block; }

template <class X>
X __shfl_sync(unsigned mask, X x, int lane, int width = emulation::kLanes) {
  return emulation::warp().meet(emulation::Meeting::kShuffle, mask, x, [&](int me, const auto& of) {
    return of(me / width * width + lane % width);
  });
}

template <class X>
X __shfl_xor_sync(unsigned mask, X x, int lanes) {
  const auto read = [lanes](int me, const auto& of) { return of(me ^ lanes); };
  return emulation::warp().meet(emulation::Meeting::kShuffle, mask, x, read);
}

inline unsigned __ballot_sync(unsigned mask, bool x) {
  return emulation::warp().meet(emulation::Meeting::kBallot, mask, x, [&](int, const auto& of) {
    unsigned bits = 0;
    for (int lane = 0; lane < emulation::kLanes; ++lane) bits |= static_cast<unsigned>(of(lane)) << lane;
    return bits;
  });
}

inline void __syncwarp() {
  emulation::warp().meet(emulation::Meeting::kSync, 0xffffffffu, 0, [](int, const auto&) { return 0; });
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

inline void atomicAdd(float* to, float x) { *to += x; }
inline void atomicAdd(double* to, double x) { *to += x; }
inline void atomicAdd(float4* to, float4 x) {
  emulation::check_aligned(to);
  *to = {to->x + x.x, to->y + x.y, to->z + x.z, to->w + x.w};
}
