// What the emulator tells its checker (emulate_check.cpp). Nothing of it is called unless the kernel was compiled with KILN_EMULATE_CHECK.
#pragma once

#include "emulate_state.hpp"

namespace emulate {

enum class Access : u8 { Read, Write, Atomic };

void check_launch_starts(u64 clusters);
void check_cluster_starts();
void check_cluster_ends();

// Order between threads: what one did before it gave its knowledge was before whatever another does after it took it.
void check_arrives(Thread& thread, Knowledge*& into);
void check_waited(Thread& thread, const Knowledge* from);
void check_phase_ends(Knowledge*& gathered, Knowledge*& released);
void check_barrier_completes(Block& block, Barrier& barrier, bool whole_block);
void check_lanes_meet(Warp& warp, u32 lanes);
void check_fence(Thread& thread);
void check_fence_proxy(Thread& thread);

void check_atomic(void* p, u32 bytes, const void* where);
void check_shared(Thread& thread, u32 smem, u32 bytes, Access access, const void* where);
void check_global(Thread& thread, const void* p, u64 bytes, Access access, const void* where);
// The copy engine's and the tensor cores' accesses to shared memory: written bytes must not be touched until the copy has come in.
void check_async_read(Thread& thread, u32 smem, u32 bytes, const void* where);
void check_async_write_starts(Thread& thread, u32 smem, u32 bytes, const void* where);
void check_async_write_ends(Thread& thread, u32 smem, u32 bytes, Mbarrier* bar, const void* where);

} // namespace emulate
