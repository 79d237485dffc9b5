import asyncio

import pytest

from pipelines.errors import interruption_behind


def test_an_interrupt_is_found_behind_the_error_it_became():
    interrupt = KeyboardInterrupt()
    with pytest.raises(SystemError) as caught:
        raise SystemError("returned a result with an exception set") from interrupt
    assert interruption_behind(caught.value) is interrupt
    assert interruption_behind(interrupt) is interrupt


def test_a_time_out_is_no_interrupt():
    async def wait():
        async with asyncio.timeout(0.001):
            await asyncio.sleep(5)

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(wait())
    assert isinstance(caught.value.__cause__, asyncio.CancelledError), "otherwise this shows nothing"
    assert interruption_behind(caught.value) is None
    assert interruption_behind(ValueError("plain")) is None
