"""The sampling benchmark's arms do the same work; what they take is not asserted."""

from benchmarks.sampling import arms, make_model, measure


def test_arms_generate_the_same_number_of_tokens_and_sharing_saves_operations():
    model = make_model(hidden=64, layers=2, vocabulary=50, context=40, device="cpu")
    prompts = [[1 + (3 * i + j) % 49 for j in range(32)] for i in range(2)]
    results = measure(arms(model, prompts, n=4, new_tokens=4), repetitions=1)
    assert {one["tokens"] for one in results.values()} == {32}
    assert results["shared"]["gflop"] < 0.6 * results["independent"]["gflop"]
