from jaxpaged.core.prefix_cache import PrefixCache, chain_key, root_key


def test_a_key_stands_for_all_tokens_before_it_and_for_the_salt():
    root = root_key("")
    assert len(chain_key(root, [1, 2])) == 32
    assert chain_key(root, [1, 2]) == chain_key(root, (1, 2))
    assert chain_key(chain_key(root, [1, 2]), [3, 4]) != chain_key(chain_key(root, [2, 1]), [3, 4])
    assert chain_key(root, [1, 2]) != chain_key(root_key("tenant"), [1, 2])
    assert root_key("\ud800") != root_key("")  # a lone surrogate is a salt like any other


def test_the_first_block_of_a_key_stays_and_a_forgotten_one_is_not_found():
    cache = PrefixCache()
    cache.insert(b"a", 1)
    cache.insert(b"a", 2)
    assert cache.find(b"a") == 1
    cache.forget(2)  # a twin that was never entered
    assert cache.find(b"a") == 1
    cache.forget(1)
    assert cache.find(b"a") is None
    cache.insert(b"b", 3)
    cache.forget_key(b"b")
    cache.insert(b"c", 3)
    cache.check()
    assert (cache.find(b"b"), cache.find(b"c"), len(cache)) == (None, 3, 1)


def test_reset_forgets_entries_and_keeps_the_counters():
    cache = PrefixCache()
    cache.insert(b"a", 1)
    cache.count(10, 4)
    cache.reset()
    assert (len(cache), cache.num_queries, cache.num_hits) == (0, 10, 4)
