#include "emulate_check.hpp"
namespace emulate {
void check_launch_starts(u64) {}
void check_cluster_starts() {}
void check_arrives(Thread&, Knowledge*&) {}
void check_waited(Thread&, const Knowledge*) {}
void check_phase_ends(Mbarrier&) {}
void check_barrier_completes(Block&, Barrier&, bool) {}
void check_lanes_meet(Warp&, u32) {}
void check_fence(Thread&) {}
void check_fence_proxy(Thread&) {}
void check_atomic(void*, u32, const void*) {}
void check_shared(Thread&, u32, u32, Access, const void*) {}
void check_global(Thread&, const void*, u64, Access, const void*) {}
void check_async_read(Thread&, u32, u32, const void*) {}
void check_async_write_starts(Thread&, u32, u32, const void*) {}
void check_async_write_ends(Thread&, u32, u32, Mbarrier*, const void*) {}
}
extern "C" void kiln_emulate_memory(u64, u64) {}
