#include <mutex>
#include <unordered_map>

#include "store/require.hpp"
#include "store/store.hpp"

namespace crush {
namespace {

struct Registry {
    std::mutex mutex;
    std::unordered_map<int32_t, std::shared_ptr<Store>> stores;
    int32_t last_id = 0;
};

Registry& registry() {
    static Registry instance;
    return instance;
}

}  // namespace

int32_t StoreRegistry::add(std::shared_ptr<Store> store) {
    Registry& r = registry();
    const std::lock_guard<std::mutex> lock(r.mutex);
    r.stores.emplace(r.last_id + 1, std::move(store));
    return ++r.last_id;
}

std::shared_ptr<Store> StoreRegistry::find(int32_t id) {
    Registry& r = registry();
    const std::lock_guard<std::mutex> lock(r.mutex);
    const auto found = r.stores.find(id);
    require(found != r.stores.end(), "crush_store must be the id of a store that is open", id);
    return found->second;
}

void StoreRegistry::remove(int32_t id) {
    std::shared_ptr<Store> last;  // freed outside the lock
    Registry& r = registry();
    const std::lock_guard<std::mutex> lock(r.mutex);
    const auto found = r.stores.find(id);
    if (found == r.stores.end()) return;
    last = std::move(found->second);
    r.stores.erase(found);
}

}  // namespace crush
