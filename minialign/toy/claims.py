"""What a response claims of a scene, as questions that the toy model was taught to answer."""

from minialign.align.claims import Claim
from minialign.toy.benchmark import DENIED, MENTION
from minialign.toy.world import EXISTS, with_article, yes_or_no


def claims_of(question: str, response: str) -> list[Claim]:
    """A claim for every object that is named, and not denied."""
    claims = []
    for name, _ in MENTION.findall(DENIED.sub("", response)):
        asked = EXISTS[0].format(with_article(name))
        claims.append(Claim(asked, yes_or_no(name, True), yes_or_no(name, False)))
    return claims
