"""How many tokens a server lets a request generate that leaves it open."""

from splitfuse.core.limits import EngineLimits
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.server.generate import _sized
from splitfuse.text.prompts import PreparedRequest


def test_a_server_gives_a_request_the_room_of_an_engine_that_is_open() -> None:
    large = EngineLimits(max_model_len=4096, vocab_size=256, num_blocks=500, block_size=16)
    small = EngineLimits(max_model_len=641, vocab_size=256, num_blocks=40, block_size=16)
    for num_prompt, default, wanted in ((30, None, 611), (30, 9, 9), (640, None, 1), (641, None, 4096 - 641)):
        prepared = PreparedRequest((1,) * num_prompt, SamplingParams())
        assert _sized(large, small, prepared, default).params.max_tokens == wanted
